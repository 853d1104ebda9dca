"""Two bundles of one model side by side: what their figures, sizes and tools differ in, and what of it is a regression.

Both are measured against the same PyTorch module, each by its own export; nothing is executed here. A is the one that B is held to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..exporter.bundle import INPUTS, OUTPUTS, read_manifest
from ..exporter.errors import Reason, UsageError
from ..exporter.manifest import Column, Manifest, OutputMetrics, StageResult, Table, Verdict
from .command import command_of
from .page import data_uri, render_page
from .report import Report, read_report
from .wording import REFERENCE_STAGES, change, decibel, flat

DEFAULT_THRESHOLD = 1.0
"""How much lower a figure of B may be, dB."""

NOISE_DB = 120.0
"""Figures above this are taken as this when regressions are sought: an error of 1e-6 of the values is what the order of float32's sums
makes of its roundoff (see `metrics.DEFAULT_TOLERANCES`), and moves by more than a dB from one processor to the next."""

ARTIFACT = "artifact"
"""Stands for the last stage that was executed, where that has another name in B than in A."""

PAGE_MARK = '<body data-page="isthmus compare">'
"""By which a page of this kind is known; it stands in the template."""

_WEAKEST_FIRST: tuple[Verdict, ...] = ("failed", "blocked", "not run", "lowered", "built", "verified")


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        folder: The bundle's folder.
        manifest: Its manifest.
        report: Its report, which says no less.
    """

    folder: Path
    manifest: Manifest
    report: Report

    @staticmethod
    def read(folder: Path) -> Side:
        """Reads a bundle.

        Raises:
            UsageError: The folder is not a bundle.
            IntegrityError: The manifest or the report is not what this version writes.
        """
        return Side(folder, read_manifest(folder), read_report(folder))

    @property
    def size(self) -> int:
        """Bytes of the bundle's files, without the report."""
        return sum(self.report.file_sizes.values())

    @property
    def coverage(self) -> float | None:
        """The share of the floating-point operations of matrix products that is in FP8; None where it was not counted."""
        return _share(self.manifest)

    def value(self) -> dict[str, Any]:
        """As JSON values."""
        m = self.manifest
        return {
            "bundle": str(self.folder),
            **{key: getattr(m, key) for key in ("target", "precision", "verdict", "device", "versions")},
            "bytes": self.size,
            "fp8_share": self.coverage,
        }


@dataclass(frozen=True)
class Figure:
    """A figure of one output in one case of one stage, on both sides, dB.

    Attributes:
        stage: The stage's name, or `ARTIFACT`.
        case: The case's name.
        output: The output's name.
        metric: `sqnr_db` or `psnr_db`.
        a: A's; None where A has no such output, case or stage.
        b: B's.
    """

    stage: str
    case: str
    output: str
    metric: str
    a: float | None
    b: float | None

    @property
    def change(self) -> float | None:
        """B - A, dB; None where one is missing, 0 where both are equal (also where both are infinite)."""
        if self.a is None or self.b is None:
            return None
        return 0.0 if self.a == self.b else self.b - self.a

    def fell(self, threshold: float) -> bool:
        """Whether B is lower than A by more than the threshold; see `NOISE_DB`. A figure that is no number has fallen."""
        if self.a is None or self.b is None or math.isnan(self.a) or self.a == self.b:
            return False
        return not min(self.a, NOISE_DB) - min(self.b, NOISE_DB) <= threshold

    def value(self) -> dict[str, Any]:
        """As JSON values; what is not finite as a string."""
        names = {key: getattr(self, key) for key in ("stage", "case", "output", "metric")}
        return {**names, **{key: _json(getattr(self, key)) for key in ("a", "b", "change")}}


@dataclass(frozen=True)
class Comparison:
    """What two bundles differ in.

    Attributes:
        a: The bundle that the other is held to.
        b: The bundle that is judged.
        threshold: How much lower a figure of B may be, dB.
        figures: SQNR and PSNR of every output.
        verdicts: Stage to the verdicts of A and B; None where there is no such stage. The bundle's own is under the empty name.
        regressions: What became worse by more than that; empty when nothing did.
        notes: What to know of the comparison.
    """

    a: Side
    b: Side
    threshold: float
    figures: tuple[Figure, ...]
    verdicts: Mapping[str, tuple[Verdict | None, Verdict | None]]
    regressions: tuple[Reason, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """3 when something became worse by more than the threshold, else 0."""
        return 3 if self.regressions else 0

    @property
    def versions(self) -> list[tuple[str, str, str]]:
        """The tools whose versions differ."""
        return _differing(self.a.manifest.versions, self.b.manifest.versions)

    @property
    def options(self) -> list[tuple[str, str, str]]:
        """The options that differ, with target, precision, opset and the calibration's method and data among them."""
        return _differing(*(_options(side.manifest) for side in (self.a, self.b)))

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "model": self.b.manifest.model,
            "a": self.a.value(),
            "b": self.b.value(),
            "threshold_db": self.threshold,
            "verdicts": [{"stage": stage or None, "a": a, "b": b} for stage, (a, b) in self.verdicts.items()],
            "figures": [figure.value() for figure in self.figures],
            "versions": [{"tool": name, "a": a or None, "b": b or None} for name, a, b in self.versions],
            "options": [{"option": name, "a": a or None, "b": b or None} for name, a, b in self.options],
            "notes": list(self.notes),
            "regressions": [{"what": r.what, "where": r.where} for r in self.regressions],
            "exit_code": self.exit_code,
        }


def compare_bundles(a: Path, b: Path, *, threshold: float = DEFAULT_THRESHOLD) -> Comparison:
    """Compares two bundles of one model.

    A figure is a regression where B's SQNR or PSNR is lower than A's by more than the threshold (see `NOISE_DB`), a verdict where B's is
    weaker; and so is what A measured and B, of the same target and precision, did not.

    Args:
        a: The folder of the bundle that B is held to.
        b: The folder of the bundle that is judged.
        threshold: How much lower a figure of B may be, dB.

    Raises:
        UsageError: A folder is not a bundle, or the two are not of one model, settings, weights, inputs and outputs; all reasons are
            listed.
        IntegrityError: A manifest or report is not what this version writes.
    """
    sides = Side.read(a), Side.read(b)
    if reasons := _incomparable(*(side.manifest for side in sides)):
        raise UsageError(
            f"{a} and {b} are not of one model", reasons=reasons, hint="compare bundles of one model, with the same settings and weights"
        )
    figures = tuple(_figures(*(side.manifest for side in sides)))
    verdicts = _verdicts(*(side.manifest for side in sides))
    regressions = (*_weaker(verdicts), *_lower(figures, threshold), *_unmeasured(figures, verdicts, *(s.manifest for s in sides)))
    return Comparison(*sides, threshold, figures, verdicts, regressions, tuple(_notes(*(side.manifest for side in sides))))


def _incomparable(a: Manifest, b: Manifest) -> list[Reason]:
    """Why two bundles are not of one model; empty when they are."""
    reasons = []
    if a.model != b.model:
        reasons.append(Reason(f"A is {a.model}, B is {b.model}", where="model"))
    for key in sorted(a.config.keys() | b.config.keys()):
        # Two models have other settings anyway.
        if a.model == b.model and a.config.get(key) != b.config.get(key):
            reasons.append(Reason(f"A has {a.config.get(key)!r}, B has {b.config.get(key)!r}", where=f"config {key}"))
    if a.weights.sha256 != b.weights.sha256:
        reasons.append(Reason(f"A has sha256 {a.weights.sha256[:16]}…, B has {b.weights.sha256[:16]}…", where="weights"))
    for kind in ("inputs", "outputs"):
        names = [[tensor.name for tensor in getattr(side, kind)] for side in (a, b)]
        if names[0] != names[1]:
            reasons.append(Reason(f"A has {', '.join(names[0])}, B has {', '.join(names[1])}", where=kind))
    return reasons


def _executed(manifest: Manifest) -> StageResult | None:
    """The artifact's last stage that was executed."""
    ran = [s for s in manifest.stages if s.name not in REFERENCE_STAGES and s.verdict in ("verified", "failed") and s.metrics]
    return ran[-1] if ran else None


def _measured(manifest: Manifest) -> dict[tuple[str, str, str], OutputMetrics]:
    return {(stage.name, m.case, m.output): m for stage in manifest.stages for m in stage.metrics}


def _figures(a: Manifest, b: Manifest) -> Iterator[Figure]:
    rows = [_measured(a), _measured(b)]
    last = [_executed(a), _executed(b)]
    if last[0] and last[1] and last[0].name != last[1].name:
        for found, stage in zip(rows, last, strict=True):
            assert stage is not None
            found.update({(ARTIFACT, m.case, m.output): m for m in stage.metrics})
    for key in dict.fromkeys((*rows[0], *rows[1])):
        for metric in ("sqnr_db", "psnr_db"):
            values = [getattr(found[key], metric) if key in found else None for found in rows]
            yield Figure(*key, metric, *values)


def _verdicts(a: Manifest, b: Manifest) -> dict[str, tuple[Verdict | None, Verdict | None]]:
    sides = [{"": m.verdict, **{stage.name: stage.verdict for stage in m.stages}} for m in (a, b)]
    return {name: (sides[0].get(name), sides[1].get(name)) for name in dict.fromkeys((*sides[0], *sides[1]))}


def _weaker(verdicts: Mapping[str, tuple[Verdict | None, Verdict | None]]) -> Iterator[Reason]:
    for stage, (a, b) in verdicts.items():
        if a is not None and b is not None and _WEAKEST_FIRST.index(b) < _WEAKEST_FIRST.index(a):
            yield Reason(f"the verdict was {a} and is {b}", where=f"stage {stage}" if stage else "the bundle")


def _lower(figures: Sequence[Figure], threshold: float) -> Iterator[Reason]:
    for figure in figures:
        if figure.fell(threshold):
            name = {"sqnr_db": "SQNR", "psnr_db": "PSNR"}[figure.metric]
            was, now = (decibel(math.nan if value is None else value) for value in (figure.a, figure.b))
            what = f"{name} was {was} dB and is {now} dB: {change(figure.change, ' dB')}, allowed is −{threshold:g} dB"
            yield Reason(what, where=f"stage {figure.stage}, case {figure.case}, output {figure.output}")


def _unmeasured(
    figures: Sequence[Figure], verdicts: Mapping[str, tuple[Verdict | None, Verdict | None]], a: Manifest, b: Manifest
) -> Iterator[Reason]:
    """What only A measured, where the two should have measured the same."""
    if (a.target, a.precision) != (b.target, b.precision):
        return
    for stage, (before, now) in verdicts.items():
        if before not in (None, "not run") and now is None:
            yield Reason(f"the verdict was {before}, and B has no such stage", where=f"stage {stage}")
    for figure in figures:
        ran = verdicts.get(figure.stage, (None, None))[1] in ("verified", "failed")
        if figure.metric == "sqnr_db" and figure.b is None and ran:
            yield Reason("is measured in A and not in B", where=f"stage {figure.stage}, case {figure.case}, output {figure.output}")


def _notes(a: Manifest, b: Manifest) -> Iterator[str]:
    if a.files.get(INPUTS) != b.files.get(INPUTS):
        yield "The two were measured on other inputs, so that a difference need not be the artifact's."
    elif a.files.get(OUTPUTS) != b.files.get(OUTPUTS):
        yield "PyTorch's own outputs differ between the two: another version or machine computed them."
    if not any(side.name not in REFERENCE_STAGES and side.verdict in ("verified", "failed") for m in (a, b) for side in m.stages):
        yield "No artifact was executed on either side, so that nothing is compared but PyTorch with itself."


def _share(manifest: Manifest) -> float | None:
    counted = manifest.details.get("coverage")
    share = counted.get("share") if isinstance(counted, dict) else None
    return float(share) if isinstance(share, int | float) else None


def _options(manifest: Manifest) -> dict[str, str]:
    calibration = manifest.details.get("calibration")
    return {
        "target": manifest.target,
        "precision": manifest.precision,
        "opset": "" if manifest.opset is None else str(manifest.opset),
        "made for": manifest.device,
        **dict(flat(manifest.options)),
        **(dict(flat(calibration, "calibration.")) if isinstance(calibration, dict) else {}),
    }


def _differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [(name, a.get(name, ""), b.get(name, "")) for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]


def _json(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _sizes(comparison: Comparison) -> Table:
    a, b = comparison.a.report.file_sizes, comparison.b.report.file_sizes
    names = sorted(a.keys() | b.keys(), key=lambda name: -max(a.get(name, 0), b.get(name, 0)))
    rows = [(name, a.get(name), b.get(name)) for name in names]
    return Table(
        name="sizes",
        title="Sizes of the files",
        columns=(
            Column(name="File", kind="code"),
            Column(name="A", kind="size"),
            Column(name="B", kind="size"),
            Column(name="B over A", kind="number"),
        ),
        rows=tuple((name, x, y, y / x if x and y is not None else None) for name, x, y in rows),
    )


def _covered(comparison: Comparison) -> Table | None:
    """FP8 coverage by module; None where neither side was counted."""
    sides = []
    for manifest in (comparison.a.manifest, comparison.b.manifest):
        counted = manifest.details.get("coverage") if _share(manifest) is not None else None
        modules = counted.get("modules", ()) if counted else ()
        sides.append({row["module"]: row["fp8"] / row["flops"] for row in modules if row["flops"]})
    if not any(sides):
        return None
    rows = []
    for module in dict.fromkeys((*sides[0], *sides[1])):
        x, y = sides[0].get(module), sides[1].get(module)
        rows.append((module, x, y, y - x if x is not None and y is not None else None))
    return Table(
        name="fp8-coverage",
        title="FP8 coverage",
        columns=(
            Column(name="PyTorch module", kind="code"),
            Column(name="A", kind="share"),
            Column(name="B", kind="share"),
            Column(name="B − A", kind="number"),
        ),
        rows=tuple(rows),
    )


def _pictures(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """Caption, and PyTorch's, A's and B's picture as `data:` URIs, of the samples that both show."""
    grids = [(side.folder, side.report.pictures) for side in (comparison.a, comparison.b)]
    if grids[0][1] is None or grids[1][1] is None:
        return []
    found = []
    for x, y in zip(grids[0][1].rows, grids[1][1].rows, strict=False):
        if x.caption == y.caption:
            a, b = grids[0][0], grids[1][0]
            found.append((x.caption, data_uri(a, x.pytorch), data_uri(a, x.artifact), data_uri(b, y.artifact)))
    return found


def comparison_page(comparison: Comparison) -> str:
    """The comparison as a page, one file with everything in it.

    Raises:
        IntegrityError: A picture of a bundle is missing or damaged.
    """
    fallen = {(f.stage, f.case, f.output, f.metric) for f in comparison.figures if f.fell(comparison.threshold)}
    rows: dict[tuple[str, str, str], dict[str, Figure]] = {}
    for figure in comparison.figures:
        rows.setdefault((figure.stage, figure.case, figure.output), {})[figure.metric] = figure
    weaker = {stage for stage, pair in comparison.verdicts.items() if next(_weaker({stage: pair}), None)}
    return render_page(
        "compare.html.j2",
        comparison=comparison,
        rows=rows,
        fallen=fallen,
        weaker=weaker,
        sizes=_sizes(comparison),
        covered=_covered(comparison),
        pictures=_pictures(comparison),
        noise=NOISE_DB,
        commands=[(name, command_of(side.manifest)) for name, side in (("A", comparison.a), ("B", comparison.b))],
    )
