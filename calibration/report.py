"""The accuracy report of a bundle: `report.json` for programs, `report.html` for people.

Both say the same. The page is one file that fetches nothing, see `page`. `write_report` runs before the manifest is written, which then
hashes its files; `render` makes the page again from `manifest.json`, `report.json`, `calibration.json`, `diff.json`, `tune.json`,
`analyses.json` and the pictures under `report/`, byte for byte the same while these are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..exporter.bundle import read_manifest, write_text
from ..exporter.errors import IntegrityError, MachineError
from ..exporter.manifest import HISTOGRAM_EDGES, MANIFEST, Decibel, Manifest, OutputMetrics, Table, Verdict
from ..exporter.ranges import FILE as CALIBRATION
from ..exporter.ranges import Bounds, Observed, read_table
from ..exporter.spec import Samples, Tolerance
from .analysis_report import read_analyses
from .charts import Spread, saturated, spread, stage_chart
from .command import command_of
from .figures import amplification, write_png
from .metrics import compare, misses
from .module_report import read_modules
from .page import data_uri, render_page
from .perceptual import lpips_style
from .similarity import ssim
from .tune_report import tune_of
from .weight_ranges import NAME as WEIGHTS
from .weight_ranges import weight_table
from .wording import headline, number, ratio, tolerance_of

JSON = "report.json"
HTML = "report.html"
CALIBRATION_TABLE = "calibration"
"""The name of the table of ranges (`table.report_table`), which a page with the calibration itself does not repeat."""
MAX_PICTURES = 16
"""Rows of the picture grid; further samples count in the PSNR and are not shown."""

Array = np.ndarray[Any, Any]

_ONNX = "model.onnx"
_PICTURES_A_LINE = 10
_MAX_JSON = 64 * 2**20


@dataclass(frozen=True)
class Pictures:
    """The same pictures, drawn from the same seed by PyTorch and by the artifact.

    Attributes:
        reference: PyTorch's.
        candidate: The artifact's; the same number, size and captions.
    """

    reference: Samples
    candidate: Samples

    def __post_init__(self) -> None:
        if self.reference.images.shape != self.candidate.images.shape or self.reference.images.ndim not in (3, 4):
            got = f"{self.reference.images.shape} and {self.candidate.images.shape}"
            raise ValueError(f"pictures need two equal shapes (N, H, W) or (N, H, W, 3), got {got}")
        if self.reference.captions != self.candidate.captions or len(self.reference.captions) != len(self.reference.images):
            raise ValueError(f"{len(self.reference.images)} pictures need as many captions, equal on both sides")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# The paths come from a file: a pattern and not just any path, so that a report cannot show a file from elsewhere.
_PicturePath = Annotated[str, Field(pattern=r"\Areport/[0-9]{2}-(pytorch|artifact|difference)\.png\z")]


class PictureRow(_Strict):
    """One sample: its caption, the files of its three pictures, and how near the artifact's is to PyTorch's.

    Attributes:
        caption: What was drawn.
        pytorch: PyTorch's picture.
        artifact: The artifact's.
        difference: What is between them.
        psnr_db: PSNR with white - black as the peak, dB; None in reports of earlier versions.
        ssim: Structural similarity, see `similarity.ssim`; None in reports of earlier versions.
        lpips_style: See `perceptual.lpips_style`; None in reports of earlier versions, and where the network's weights are not installed.
    """

    caption: str
    pytorch: _PicturePath
    artifact: _PicturePath
    difference: _PicturePath
    psnr_db: Decibel | None = None
    ssim: Decibel | None = None
    lpips_style: Decibel | None = None


class PictureGrid(_Strict):
    """The samples that are shown.

    Attributes:
        rows: At most `MAX_PICTURES`.
        count: How many samples were drawn and measured.
        amplification: What |artifact - PyTorch| is multiplied by to be seen.
        metrics: Of all samples together, end to end.
        ssim: The mean structural similarity of all samples; None in reports of earlier versions.
        worst_ssim: The least of a sample; None in reports of earlier versions.
        lpips_style: The mean LPIPS-style distance of all samples; None as in `PictureRow`.
        worst_lpips_style: The greatest of a sample; None as in `PictureRow`.
        lpips_style_missing: Why it was not measured, and what to install.
    """

    rows: tuple[PictureRow, ...]
    count: int
    amplification: float
    metrics: OutputMetrics
    ssim: Decibel | None = None
    worst_ssim: Decibel | None = None
    lpips_style: Decibel | None = None
    worst_lpips_style: Decibel | None = None
    lpips_style_missing: str = ""


class MissedBound(_Strict):
    """A bound of the tolerance that an output does not keep.

    Attributes:
        stage: The stage's name.
        case: The case's name.
        output: The output's name.
        metric: The field of its metrics.
        what: Got and expected.
    """

    stage: str
    case: str
    output: str
    metric: str
    what: str


class Report(Manifest):
    """The contents of `report.json`: the manifest without the hashes of the files, and what else the page shows.

    Attributes:
        headline: The verdict in one sentence.
        missed: Every bound that an output does not keep.
        histogram_edges: See `HISTOGRAM_EDGES`.
        pictures: The samples, where the model has a sampler.
        warnings: Sentences that the page shows in red, above everything else.
        notes: Sentences about the lowering.
        tables: Tables of the target.
        facts: Further figures.
        file_sizes: Path to bytes of the bundle's files, when the report was written.
    """

    headline: str
    missed: tuple[MissedBound, ...]
    histogram_edges: tuple[int, ...] = HISTOGRAM_EDGES
    pictures: PictureGrid | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    facts: dict[str, Any] = Field(default_factory=dict)
    file_sizes: dict[str, int] = Field(default_factory=dict)


def write_report(folder: Path, manifest: Manifest, *, pictures: Pictures | None = None, facts: Mapping[str, object] | None = None) -> None:
    """Writes `report.json`, `report.html` and the pictures (`report/*.png`) into a bundle's folder.

    Args:
        folder: The bundle's folder, with the artifact's files in it and without a manifest.
        manifest: What is going to be the manifest; its `files` are not used.
        pictures: Samples of PyTorch and of the artifact from the same seed.
        facts: What else to show. `warnings` and `notes` are sequences of sentences, `tables` of `Table`; everything else is listed by its
            key.
    """
    rest = dict(facts or {})
    warnings, notes = (_sentences(rest.pop(key, ())) for key in ("warnings", "notes"))
    tables: Any = rest.pop("tables", ())
    report = _report(
        manifest,
        pictures=_write_pictures(folder, pictures) if pictures is not None else None,
        warnings=warnings,
        notes=notes,
        tables=(*tables, *_weights(folder)),
        facts=rest,
        file_sizes=_file_sizes(folder),
    )
    _write(folder, report)


def _weights(folder: Path) -> tuple[Table, ...]:
    """The weights' ranges, of bundles that were calibrated: others store no codes."""
    graph = folder / _ONNX
    table = weight_table(graph) if graph.is_file() and (folder / CALIBRATION).is_file() else None
    return (table,) if table is not None else ()


def _write(folder: Path, report: Report) -> None:
    # `fallback` so that a figure of an unforeseen type (a Path, a numpy scalar) is shown, and does not lose the whole report.
    text = report.model_dump_json(by_alias=True, indent=2, exclude={"files"}, fallback=str)
    write_text(folder / JSON, text + "\n")
    # Of what was read back: the page is then the one that `render` makes.
    write_text(folder / HTML, _page(folder, _read(folder)))


def rewrite_report(folder: Path, manifest: Manifest, *, notes: Sequence[str] = ()) -> None:
    """Writes both files again for a manifest that says more by now; pictures, warnings, notes and facts stay, notes may come to them.

    Args:
        folder: The bundle's folder, writable.
        manifest: The new manifest, which need not be written yet.
        notes: Further sentences.

    Raises:
        IntegrityError: `report.json` or a picture is missing, damaged, or not what this version writes.
    """
    old = _read(folder)
    report = _report(
        manifest,
        pictures=old.pictures,
        warnings=old.warnings,
        notes=(*old.notes, *(n for n in notes if n not in old.notes)),
        tables=old.tables,
        facts=old.facts,
        file_sizes=_file_sizes(folder),
    )
    _write(folder, report)


def render(folder: Path) -> str:
    """The page of a finished bundle, made again. What the manifest says by now (a stage run later, say) is what the page says.

    Returns:
        The HTML text. The bundle is left as it is: its manifest holds the hash of the page that it was written with.

    Raises:
        UsageError: `folder` is not a bundle.
        IntegrityError: `report.json` or a picture is missing, damaged, or not what this version writes.
    """
    return _page(folder, read_report(folder))


def read_report(folder: Path) -> Report:
    """The report of a finished bundle, with what its manifest says by now.

    Raises:
        UsageError: `folder` is not a bundle.
        IntegrityError: `report.json` is missing, damaged, or not what this version writes.
    """
    manifest, old = read_manifest(folder), _read(folder)
    kept = {name: getattr(old, name) for name in ("pictures", "warnings", "notes", "tables", "facts", "file_sizes")}
    return _report(manifest, **kept)


def _report(manifest: Manifest, **rest: Any) -> Report:
    fields = {name: getattr(manifest, name) for name in Manifest.model_fields if name not in ("schema_", "files")}
    missed = [
        MissedBound(stage=stage.name, case=m.case, output=m.output, metric=miss.metric, what=miss.text)
        for stage in manifest.stages
        for m in stage.metrics
        for miss in misses(m, tolerance_of(manifest, stage, m))
    ]
    return Report(schema=manifest.schema_, **fields, headline=headline(manifest), missed=tuple(missed), **rest)


def _sentences(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(str(item) for item in value) if isinstance(value, Sequence) else ()


def _file_sizes(folder: Path) -> dict[str, int]:
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: p.stat().st_size for name, p in files.items() if name not in (MANIFEST, JSON, HTML) and not name.startswith("report/")}


def _write_pictures(folder: Path, pictures: Pictures) -> PictureGrid:
    reference, candidate = pictures.reference.images, pictures.candidate.images
    with np.errstate(invalid="ignore"):  # Inf - Inf: such pixels are drawn as broken
        difference = np.abs(candidate.astype(np.float64) - reference.astype(np.float64))
    factor = amplification(difference)
    similar = [ssim(r, c) for r, c in zip(reference, candidate, strict=True)]
    distances: list[float] = []
    missing = ""
    try:
        distances = lpips_style(reference, candidate)
    except MachineError as error:
        missing = f"{error.message}: {error.hint}"
    rows = []
    for i, caption in enumerate(pictures.reference.captions[:MAX_PICTURES]):
        row = PictureRow(
            caption=caption,
            pytorch=f"report/{i:02d}-pytorch.png",
            artifact=f"report/{i:02d}-artifact.png",
            difference=f"report/{i:02d}-difference.png",
            psnr_db=_psnr(difference[i]),
            ssim=similar[i],
            lpips_style=distances[i] if distances else None,
        )
        write_png(folder / row.pytorch, reference[i])
        write_png(folder / row.artifact, candidate[i])
        write_png(folder / row.difference, difference[i] * factor)
        rows.append(row)
    return PictureGrid(
        rows=tuple(rows),
        count=len(reference),
        amplification=factor,
        metrics=compare(reference, candidate, case="samples", output="images"),
        ssim=float(np.mean(similar)) if similar else None,
        worst_ssim=float(np.min(similar)) if similar else None,
        lpips_style=float(np.mean(distances)) if distances else None,
        worst_lpips_style=float(np.max(distances)) if distances else None,
        lpips_style_missing=missing,
    )


def _psnr(difference: Array) -> float:
    """dB, with a peak of 1; NaN where a pixel is not finite."""
    squared = float(np.mean(difference**2))
    return -10 * math.log10(squared) if squared > 0 else math.inf if squared == 0 else math.nan


def _read(folder: Path) -> Report:
    path = folder / JSON
    if not path.is_file():
        raise IntegrityError(f"{folder} holds no {JSON}", hint="export again")
    if path.stat().st_size > _MAX_JSON:
        raise IntegrityError(f"{path} has {path.stat().st_size} bytes, expected at most {_MAX_JSON}; it was not read")
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise IntegrityError(f"{path} is not a report: {where}: {first['msg']}", hint="export again") from error


@dataclass(frozen=True)
class _Histogram:
    """One row of bars: how many elements of an output, over a stage's cases, have their |error| / range in each decade."""

    stage: str
    output: str
    counts: tuple[int, ...]
    bound: float | None

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def first_beyond(self) -> int | None:
        """The first bin that lies beyond the bound altogether."""
        if self.bound is None:
            return None
        return next((i + 1 for i, edge in enumerate(HISTOGRAM_EDGES) if 10.0**edge >= self.bound * (1 - 1e-9)), None)


def _histograms(report: Report) -> list[_Histogram]:
    found: dict[tuple[str, str], _Histogram] = {}
    for stage in report.stages:
        for m in stage.metrics:
            if sum(m.histogram):
                key = stage.name, f"{m.output} (samples)" if m.case == "samples" else m.output
                old = found[key].counts if key in found else (0,) * len(m.histogram)
                counts = tuple(a + b for a, b in zip(old, m.histogram, strict=True))
                found[key] = _Histogram(*key, counts, tolerance_of(report, stage, m).max_relative)
    return list(found.values())


@dataclass(frozen=True)
class _Range:
    """What was seen of a value, and what is represented of it on each grid, with the share that saturates."""

    name: str
    seen: Observed
    represented: tuple[tuple[Bounds | None, float], ...]

    @property
    def most(self) -> float | None:
        """What 99.9 % of |value| do not exceed."""
        return self.seen.percentiles.get("99.9")

    @property
    def spread(self) -> Spread | None:
        """Its histogram, with what the first grid represents."""
        bounds = self.represented[0][0] if self.represented else None
        return spread(self.seen.histogram, bounds) if self.seen.histogram is not None else None

    @property
    def tip(self) -> str:
        """In words."""
        seen = f"{self.name}: {number(self.seen.min)} to {number(self.seen.max)}"
        bounds, lost = self.represented[0] if self.represented else (None, 0.0)
        return seen if bounds is None else f"{seen}\nrepresented: {number(bounds.low)} to {number(bounds.high)}; saturates: {ratio(lost)}"


@dataclass(frozen=True)
class _Ranges:
    """The bundle's calibration table, as the page shows it."""

    sentence: str
    grids: tuple[str, ...]
    rows: tuple[_Range, ...]

    @property
    def drifts(self) -> bool:
        """Whether there is a drift over the timesteps."""
        return any(row.seen.drift is not None for row in self.rows)


def _ranges(folder: Path) -> _Ranges | None:
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise IntegrityError(f"{CALIBRATION} leads out of {folder}", hint="export again")
    table = read_table(path)
    grids = tuple(dict.fromkeys(grid for seen in table.values.values() for grid in seen.ranges))
    rows = []
    for name, seen in table.values.items():
        bounds = [seen.ranges.get(grid) for grid in grids]
        lost = [saturated(seen.histogram, b) if b is not None and seen.histogram is not None else 0.0 for b in bounds]
        rows.append(_Range(name, seen, tuple(zip(bounds, lost, strict=True))))
    return _Ranges(table.sentence().removeprefix("ranges: "), grids, tuple(rows))


def _page(folder: Path, report: Report) -> str:
    ranges = _ranges(folder)
    rows = report.pictures.rows if report.pictures else ()
    lines = -(-len(rows) // _PICTURES_A_LINE) or 1  # lines of equal length, where 16 in lines of 10 would leave 6
    return render_page(
        "report.html.j2",
        report=report,
        tolerance=Tolerance(**report.tolerance),
        tolerance_of=lambda stage, m: tolerance_of(report, stage, m),
        missed={(m.stage, m.case, m.output, m.metric): m.what for m in report.missed},
        chain=stage_chart(report.stages),
        command=command_of(report),
        ranges=ranges,
        # What the section of the ranges shows, it shows in full.
        tables=[t for t in report.tables if t.name != WEIGHTS and (ranges is None or t.name != CALIBRATION_TABLE)],
        weights=next((t for t in report.tables if t.name == WEIGHTS), None),
        modules=read_modules(folder),
        tune=tune_of(folder),
        analyses=read_analyses(folder),
        histograms=_histograms(report),
        images={name: data_uri(folder, name) for row in rows for name in (row.pytorch, row.artifact, row.difference)},
        pictures_a_line=-(-len(rows) // lines) or 1,
        meanings=_MEANINGS,
    )


_MEANINGS: Mapping[Verdict, str] = {
    "verified": "Executed here, within tolerance of PyTorch",
    "built": "Accepted by the vendor's compiler here, not executed",
    "lowered": "Static checks only, not executed",
    "blocked": "Could not be executed although it should",
    "failed": "Executed here, outside tolerance",
    "not run": "Nothing is claimed",
}
