"""The geometry of the report's charts: where marks lie, before a template draws them as SVG.

Places across are in per cent, so that a chart fits a phone without its text shrinking; places downwards are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..exporter.manifest import StageResult
from ..exporter.ranges import Bins, Bounds
from .wording import decibel

TOP, BOTTOM = 14.0, 150.0
"""Pixels from the upper edge between which values lie."""

_LEFT, _RIGHT = 9.0, 98.0  # per cent; the labels of the lines stand left of it
_IN_A_ROW = 3  # labels that fit beside each other on a phone
_LOWEST = 1e-12
"""Errors below this are drawn at it: it is below the roundoff of everything but float64."""


@dataclass(frozen=True)
class Mark:
    """A point of a chart.

    Attributes:
        x: Per cent from the left.
        y: Pixels from the top.
        label: What stands below it; may be empty.
        row: Whether the label is in the second row: many labels in one would overlap on a phone.
        tip: What it stands for.
        kind: Its class: a verdict with hyphens, or the name of its series.
        open: Whether it is drawn hollow, because there is no figure.
    """

    x: float
    y: float
    label: str = ""
    row: int = 0
    tip: str = ""
    kind: str = ""
    open: bool = False


@dataclass(frozen=True)
class Line:
    """A line across a chart, with its label at the left."""

    y: float
    label: str
    kind: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: What people read.
        kind: Its class.
        marks: From the left to the right.
        joined: Whether lines join them.
    """

    name: str
    kind: str
    marks: tuple[Mark, ...]
    joined: bool = True

    @property
    def segments(self) -> Iterator[tuple[Mark, Mark]]:
        """The lines between neighbours."""
        if self.joined:
            yield from zip(self.marks, self.marks[1:], strict=False)


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: What it shows, for those who do not see it.
        series: Its points.
        lines: Lines across.
        labels: Labels below it.
    """

    title: str
    series: tuple[Series, ...]
    lines: tuple[Line, ...]
    labels: tuple[Mark, ...] = ()


def stage_chart(stages: Sequence[StageResult]) -> Chart | None:
    """The worst SQNR of each stage, in order; None where no stage measured one.

    An infinite SQNR, of equal outputs, lies on the uppermost line. Stages without a figure lie on the lowest, hollow.
    """
    worst = {s.name: min((m.sqnr_db for m in s.metrics if m.case != "samples"), default=None) for s in stages}
    finite = [v for v in worst.values() if v is not None and math.isfinite(v)]
    if not any(v is not None for v in worst.values()):
        return None
    ceiling = 20.0 * max(1, math.ceil(max(finite, default=0.0) / 20))
    exact = any(v == math.inf for v in worst.values())
    upper = TOP + 18 if exact else TOP  # the line of equal outputs lies above the others

    def place(value: float) -> float:
        if value == math.inf:
            return TOP
        return BOTTOM - (BOTTOM - upper) * min(1.0, max(0.0, value / ceiling))

    step = 20.0 if ceiling <= 80 else 40.0
    lines = [Line(place(step * i), f"{step * i:g} dB") for i in range(int(ceiling // step) + 1)]
    lines += [Line(TOP, "equal", "equal")] if exact else []
    found, idle = [], []
    for i, stage in enumerate(stages):
        row = i % 2 if len(stages) > _IN_A_ROW else 0
        x = _LEFT + (_RIGHT - _LEFT) * (i + 0.5) / len(stages)
        value = worst[stage.name]
        kind = stage.verdict.replace(" ", "-")
        if value is None:
            idle.append(Mark(x, BOTTOM, stage.name, row, f"{stage.name}: {stage.verdict}, no figure", kind, open=True))
        else:
            tip = f"{stage.name}: {stage.verdict}\nworst SQNR {decibel(value)} dB"
            found.append(Mark(x, place(value), stage.name, row, tip, kind))
    title = "; ".join(mark.tip.replace("\n", ", ") for mark in (*found, *idle))
    return Chart(title, (Series("measured", "stage", tuple(found)), Series("idle", "stage", tuple(idle), joined=False)), tuple(lines))


@dataclass(frozen=True)
class Points:
    """Figures to draw.

    Attributes:
        name: What people read.
        kind: The class of the series.
        values: Place across, figure, and what it stands for; the units are those of the chart.
        joined: Whether lines join them.
    """

    name: str
    kind: str
    values: Sequence[tuple[float, float, str]]
    joined: bool = True


def error_chart(
    title: str, points: Sequence[Points], *, bound: float | None = None, across: Callable[[float], str] | None = None
) -> Chart | None:
    """Relative errors on a logarithmic scale; None where there is nothing to draw.

    Args:
        title: What it shows.
        points: The series: relative errors, at places in any unit.
        bound: The error above which a module has gone wrong: a line of its own.
        across: How a place across is written; the first, the middle and the last then stand below the chart.
    """
    values = [(x, max(y, _LOWEST)) for each in points for x, y, _ in each.values]
    if not values:
        return None
    every = [y for _, y in values if math.isfinite(y)] + ([bound] if bound else [])
    low, high = (math.floor(math.log10(min(every, default=1.0))), math.ceil(math.log10(max(every, default=1.0))))
    high = max(high, low + 1)
    first, last = min(x for x, _ in values), max(x for x, _ in values)

    def x_of(x: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * ((x - first) / (last - first) if last > first else 0.5)

    def y_of(y: float) -> float:
        if not math.isfinite(y):
            return TOP
        return BOTTOM - (BOTTOM - TOP) * (math.log10(max(y, _LOWEST)) - low) / (high - low)

    step = max(1, math.ceil((high - low) / 6))
    lines = [Line(y_of(10.0**e), f"1e{e}" if e else "1") for e in range(low, high + 1, step)]
    if bound:
        lines.append(Line(y_of(bound), "", "bound"))
    labels: tuple[Mark, ...] = ()
    if across is not None:
        labels = tuple(Mark(x_of(x), BOTTOM, across(x)) for x in dict.fromkeys((first, (first + last) / 2, last)))
    return Chart(title, _series(points, x_of, y_of), tuple(lines), labels)


def scatter_chart(title: str, points: Sequence[Points], *, bound: float | None = None) -> Chart:
    """Decibels against a share, both on linear scales.

    Args:
        title: What it shows.
        points: The series: dB, at shares from 0 to 1. A figure that is not finite lies on the uppermost line, or the lowest.
        bound: A figure that is asked for: a line of its own.
    """
    every = [y for each in points for _, y, _ in each.values if math.isfinite(y)] + ([bound] if bound is not None else [])
    step = next(s for s in (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, math.inf) if (max(every, default=1.0) - min(every, default=0.0)) / s <= 6)
    step = step if math.isfinite(step) else (max(every) - min(every)) / 6
    low, high = math.floor(min(every, default=0.0) / step), math.ceil(max(every, default=1.0) / step)
    high = max(high, low + 1)

    def y_of(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * min(1.0, max(0.0, (y / step - low) / (high - low)))

    def x_of(x: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * min(1.0, max(0.0, x))

    lines = [Line(y_of(step * i), f"{step * i:.4g} dB") for i in range(low, high + 1)]
    if bound is not None:
        lines.append(Line(y_of(bound), "", "bound"))
    labels = tuple(Mark(x_of(x), BOTTOM, f"{100 * x:g} %") for x in (0.0, 0.25, 0.5, 0.75, 1.0))
    return Chart(title, _series(points, x_of, y_of), tuple(lines), labels)


def _series(points: Sequence[Points], x_of: Callable[[float], float], y_of: Callable[[float], float]) -> tuple[Series, ...]:
    """The series that have points, in their places."""
    return tuple(
        Series(each.name, each.kind, tuple(Mark(x_of(x), y_of(y), "", 0, tip, each.kind) for x, y, tip in each.values), each.joined)
        for each in points
        if each.values
    )


@dataclass(frozen=True)
class Spread:
    """A small histogram, `width` bins wide and 1 high, as paths of SVG.

    Attributes:
        width: Number of bins.
        inside: The bins that are represented.
        outside: The bins that saturate.
        low: Where the represented values begin, in bins; within 0 and the width.
        high: Where they end.
    """

    width: int
    inside: str
    outside: str
    low: float
    high: float


def spread(bins: Bins, bounds: Bounds | None) -> Spread:
    """The histogram of a value with what is represented of it; heights are logarithmic, so that few large values are seen."""
    length, tallest = 2.0**bins.exponent, math.log1p(max(bins.counts, default=1) or 1)
    paths = ["", ""]
    for i, n in enumerate(bins.counts):
        if n:
            paths[_beyond(bins, i, bounds)] += f"M{i} 1v{-max(0.06, math.log1p(n) / tallest):.3f}h1V1z"
    edges = [0.0, float(len(bins.counts))]
    if bounds is not None:
        edges = [min(edges[1], max(0.0, bound / length - bins.first)) for bound in (bounds.low, bounds.high)]
    return Spread(len(bins.counts), paths[0], paths[1], *edges)


def saturated(bins: Bins, bounds: Bounds) -> float:
    """The share of the numbers that lie outside what is represented, from 0 to 1. Of a bin that lies there in part, none are counted."""
    total = sum(bins.counts)
    return sum(n for i, n in enumerate(bins.counts) if _beyond(bins, i, bounds)) / total if total else 0.0


def _beyond(bins: Bins, index: int, bounds: Bounds | None) -> bool:
    start = (bins.first + index) * 2.0**bins.exponent
    return bounds is not None and (start >= bounds.high or start + 2.0**bins.exponent <= bounds.low)
