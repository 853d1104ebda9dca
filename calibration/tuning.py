"""Searches for the modules that compute in a low precision: as many floating point operations as a budget of accuracy allows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..exporter.errors import IsthmusError, Reason
from .executors import Executor
from .journal import Journal
from .sensitivity import Unit, by_price, predicted
from .trials import Noise, sqnr_db

On = frozenset[int]

STEPS = 8
"""Of the front of Pareto: choices are measured at every eighth of the operations."""

_NO_DISTANCE = 1e-30
"""In place of a bound of 0, of which any distance spends very much."""

REPAIRS = 16
"""Trials that try to add single modules to the best choice of the sorted list."""

SEARCH_TRIALS = 20
"""About how many trials a search takes beside those of single modules, for the time that is left."""

Tell = Callable[[int, int, float | None], None]
"""Told of trials: how many are done, how many there will be about, and the seconds that are left, None before that can be told."""


@dataclass(frozen=True)
class Budget:
    """How much accuracy is asked for.

    Attributes:
        min_sqnr: Of the worst output over held-out inputs, against the same graph without quantisation, dB; None for any.
        min_psnr: Of the pictures at the end of the sampler, dB; None for any.
        max_lpips: Of the LPIPS-style distance of these pictures, their mean; None for any.
    """

    min_sqnr: float | None = None
    min_psnr: float | None = None
    max_lpips: float | None = None


@dataclass(frozen=True)
class Point:
    """A choice of modules that was measured.

    Attributes:
        on: The indices of the modules in the low precision.
        share: Of the floating point operations of all matrix products, the part that is in the low precision, 0 to 1.
        sqnr_db: Of the worst output.
        psnr_db: Of the pictures; None where they were not drawn.
        lpips_style: Of the pictures, the mean of `perceptual.lpips_style`; None where it was not measured.
    """

    on: On
    share: float
    sqnr_db: float
    psnr_db: float | None = None
    lpips_style: float | None = None


@dataclass
class Trialing:
    """Measures choices of modules, each once: what the journal knows is not run again.

    Attributes:
        executor: Runs trials.
        journal: Keeps what they find.
        tell: Told of the progress.
        expected: How many trials there will be about.
        known: How many were taken from the journal.
        done: How many there were in all.
    """

    executor: Executor
    journal: Journal
    tell: Tell | None = None
    expected: int = 0
    known: int = 0
    done: int = 0
    _ran: int = 0
    _seconds: float = 0.0
    _counted: set[str] = field(default_factory=set)

    def noises(self, folder: Path, fingerprint: str, choices: Sequence[On]) -> list[Noise]:
        """The noise of each choice.

        Args:
            folder: See `trials`.
            fingerprint: Of the folder.
            choices: The indices of the switches that are on.

        Raises:
            IsthmusError: A trial failed.
        """
        keys = [_key("noise", fingerprint, on) for on in choices]
        asked = {key: sorted(on) for key, on in zip(keys, choices, strict=True) if self._missing(key)}
        started = time.perf_counter()
        for key, noise in self.executor.run(folder, asked) if asked else ():
            self.journal.add(key, noise)
            self._count(key, time.perf_counter() - started)
            started = time.perf_counter()
        found = [self.journal.get(key) for key in keys]
        return [noise for noise in found if noise is not None]

    def value(self, kind: str, fingerprint: str, on: On, measure: Callable[[], float]) -> float:
        """A number that is measured here: from the journal, or by a call."""
        key = _key(kind, fingerprint, on)
        if self._missing(key):
            started = time.perf_counter()
            self.journal.add(key, [measure()])
            self._count(key, time.perf_counter() - started)
        found = self.journal.get(key)
        assert found is not None
        return found[0]

    def _missing(self, key: str) -> bool:
        if self.journal.get(key) is None:
            return True
        if key not in self._counted:
            self._counted.add(key)
            self.known, self.done = self.known + 1, self.done + 1
        return False

    def _count(self, key: str, seconds: float) -> None:
        self._counted.add(key)
        self.done, self._ran, self._seconds = self.done + 1, self._ran + 1, self._seconds + seconds
        if self.tell is not None:
            self.expected = max(self.expected, self.done)
            self.tell(self.done, self.expected, (self.expected - self.done) * self._seconds / self._ran)


def _key(kind: str, fingerprint: str, on: Collection[int]) -> str:
    return hashlib.sha256(json.dumps([kind, fingerprint, sorted(on)]).encode()).hexdigest()


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        best: The choice within the budget that has the most operations in the low precision.
        points: All that was measured, by share, each once.
        order: The modules, the cheapest first: see `sensitivity.by_price`.
        alone: Each module alone. Pictures are drawn with each where the budget is about pictures.
        predicted_sqnr_db: What the noises of single modules add up to for `best`.
    """

    best: Point
    points: tuple[Point, ...]
    order: tuple[int, ...]
    alone: tuple[Point, ...]
    predicted_sqnr_db: float


def search(
    units: Sequence[Unit],
    total: int,
    budget: Budget,
    *,
    noises: Callable[[Sequence[On]], list[Noise]],
    psnr: Callable[[On], float] | None = None,
    lpips: Callable[[On], float] | None = None,
    also: Iterable[On] = (),
) -> Found:
    """The modules that compute in the low precision.

    First every module alone. Were the errors of modules independent, their energies would add up, and the most operations within a budget
    would be a knapsack: its relaxed solution takes modules by noise for an operation until the budget is spent. The noise is that of the
    bound that the module spends the largest part of: of the outputs, or of the pictures at the end of the sampler. Real runs then bisect
    that sorted list, because errors only nearly add up, and try to add modules behind it that may still fit. What is returned was measured
    itself.

    Args:
        units: The modules.
        total: The operations of all products.
        budget: The bounds.
        noises: Measures choices; called with many at a time.
        psnr: Draws pictures with a choice, and measures them, dB; needed for a budget of `min_psnr`. Called for every module alone where
            there is a budget of pictures, and for choices within `min_sqnr` only.
        lpips: The same, for a budget of `max_lpips`; of choices it is called for those within the other bounds only.
        also: Choices that are measured too, for the points.

    Raises:
        IsthmusError: No choice is within the budget.
    """
    alone = [frozenset([i]) for i in range(len(units))]
    single = tuple(noises(alone))
    known: dict[On, Noise] = dict(zip(alone, single, strict=True))
    pictured = budget.min_psnr is not None or budget.max_lpips is not None
    drawn = {  # of each module alone; a distance after the PSNR of the same pictures, which are then drawn once
        on: (psnr(on) if pictured and psnr else None, lpips(on) if budget.max_lpips is not None and lpips else None) for on in alone
    }
    measured: dict[On, Point] = {}

    def pointed(on: On) -> Point:
        share = sum(units[i].flops for i in on) / total if total else 0.0
        return Point(on, share, sqnr_db(known[on]), *drawn.get(on, (None, None)))

    def measure(choices: Sequence[On]) -> list[Point]:
        new = [on for on in dict.fromkeys(choices) if on not in known]
        known.update(zip(new, noises(new) if new else [], strict=True))
        for on in choices:
            if on not in measured:
                measured[on] = pointed(on)
        return [measured[on] for on in choices]

    def fits(on: On) -> bool:
        (point,) = measure([on])
        if budget.min_sqnr is not None and point.sqnr_db < budget.min_sqnr:
            return False
        if budget.min_psnr is not None and psnr is not None:
            if point.psnr_db is None:
                point = measured[on] = dataclasses.replace(point, psnr_db=psnr(on))
            assert point.psnr_db is not None
            if point.psnr_db < budget.min_psnr:
                return False
        if budget.max_lpips is not None and lpips is not None:
            if point.lpips_style is None:
                point = measured[on] = dataclasses.replace(point, lpips_style=lpips(on))
            assert point.lpips_style is not None
            return point.lpips_style <= budget.max_lpips
        return True

    points_alone = tuple(map(pointed, alone))
    # A bound on the outputs alone leaves the noises as they are, so that no two of them become equal by a division.
    spent = [_spent(point, budget) for point in points_alone] if pictured else [max(noise, default=0.0) for noise in single]
    order = by_price(units, [(part,) for part in spent])
    first = [frozenset(order[: i + 1]) for i in range(len(order))]  # the beginnings of the sorted list
    shares = [sum(units[i].flops for i in on) for on in first]
    front = sorted({next(i for i, share in enumerate(shares) if share * STEPS >= step * shares[-1]) for step in range(1, STEPS + 1)})
    measure([*(first[i] for i in front), *also])

    low, high = -1, len(first)  # first[low] is within the budget, first[high] is not
    for i in front:
        if i < high and fits(first[i]):
            low = i
        else:
            high = min(high, i)
            break
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(first[middle]) else (low, middle)
    best: On = first[low] if low >= 0 else frozenset()
    left = [i for i in order if i not in best and _hopeful(points_alone, single, {*best, i}, budget)]
    for i in sorted(left[:REPAIRS], key=lambda i: (-units[i].flops, i)):
        if _hopeful(points_alone, single, {*best, i}, budget) and fits(best | {i}):
            best = best | {i}
    if not best:
        quietest = min(range(len(units)), key=lambda i: spent[i])
        point = points_alone[quietest]
        figures = [f"{point.sqnr_db:.2f} dB of SQNR"]
        figures += [f"{point.psnr_db:.2f} dB of PSNR"] if point.psnr_db is not None else []
        figures += [f"an LPIPS-style distance of {point.lpips_style:.3g}"] if point.lpips_style is not None else []
        raise IsthmusError(
            "no module fits into the budget of accuracy",
            reasons=[Reason(f"the module that makes the least noise, {units[quietest].module}, leaves {' and '.join(figures)}")],
            hint="give a smaller --min-sqnr or --min-psnr, a larger --max-lpips, or another precision",
        )
    points = tuple(sorted(measured.values(), key=lambda p: (p.share, p.sqnr_db, sorted(p.on))))
    return Found(measured[best], points, order, points_alone, sqnr_db(predicted(single, best)))


def _energy(decibel: float) -> float:
    """The energy of an error over that of what it is held to, of a ratio in dB."""
    return float(10 ** (-decibel / 10))


def _spent(point: Point, budget: Budget) -> float:
    """The part of the budget that a choice spends, of the bound that it spends the most of; 1 is all of it."""
    parts = []
    if budget.min_sqnr is not None:
        parts.append(_energy(point.sqnr_db - budget.min_sqnr))
    if budget.min_psnr is not None and point.psnr_db is not None:
        parts.append(_energy(point.psnr_db - budget.min_psnr))
    if budget.max_lpips is not None and point.lpips_style is not None:
        parts.append(point.lpips_style / max(budget.max_lpips, _NO_DISTANCE))
    return max(parts, default=0.0)


def _hopeful(alone: Sequence[Point], noises: Sequence[Noise], on: Collection[int], budget: Budget) -> bool:
    """Whether a choice may fit: what is predicted is at most 3 dB over each bound, by which errors that are not independent can differ."""
    if budget.min_sqnr is not None and sqnr_db(predicted(noises, on)) < budget.min_sqnr - 3.0:
        return False
    psnrs = [alone[i].psnr_db for i in on]
    if budget.min_psnr is not None and sum(_energy(p - budget.min_psnr) for p in psnrs if p is not None) > _energy(-3.0):
        return False
    distances = [alone[i].lpips_style for i in on]
    return budget.max_lpips is None or sum(d for d in distances if d is not None) <= _energy(-3.0) * budget.max_lpips


def front_of(points: Sequence[Point]) -> tuple[Point, ...]:
    """Of some points those that no other beats: none has as much in the low precision, as high an SQNR, and more of one of them."""
    return tuple(
        p
        for p in points
        if not any(q.share >= p.share and q.sqnr_db >= p.sqnr_db and (q.share > p.share or q.sqnr_db > p.sqnr_db) for q in points)
    )


def dominates(front: Sequence[Point], share: float, sqnr: float) -> bool:
    """Whether a point of a front is at least as good as another choice in both respects, and better in one."""
    return any(p.share >= share and p.sqnr_db >= sqnr and (p.share > share or p.sqnr_db > sqnr) for p in front)


def point_value(point: Point, units: Sequence[Unit]) -> dict[str, Any]:
    """A point as JSON values."""
    return {
        "flop_share": point.share,
        "sqnr_db": point.sqnr_db,
        "psnr_db": point.psnr_db,
        "lpips_style": point.lpips_style,
        "modules": [units[i].module for i in sorted(point.on)],
    }
