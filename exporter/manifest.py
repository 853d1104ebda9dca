"""The manifest of a bundle: what an artifact is, how it was made, and what each stage of its verification found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_validator

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

Verdict = Literal["verified", "built", "lowered", "blocked", "failed", "not run"]
"""What may be claimed of a stage: executed here and within tolerance; accepted by the vendor's compiler here; static checks only;
could not be executed although it should (see the reason); executed here and outside tolerance; and not run at all."""

_WEAKEST_FIRST: tuple[Verdict, ...] = ("failed", "blocked", "lowered", "built", "verified")

# JSON has neither inf nor nan: they are written as the strings "inf", "-inf" and "nan". A perfect match has an infinite PSNR.
Decibel = Annotated[float, PlainSerializer(lambda x: x if np.isfinite(x) else str(x), when_used="json")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OutputMetrics(_Strict):
    """How far one output of one case is from PyTorch's. All errors are artifact - reference, computed in float64.

    Attributes:
        case: `example`, `second`, or a case at another size; `samples` for pictures drawn end to end.
        output: The output's name.
        shape: Its shape.
        max_abs: max |error|.
        mean_abs: mean |error|.
        range: max(reference) - min(reference).
        max_relative: max_abs / range (inf when the range is 0 and there is an error, 0 when there is none).
        relative_l2: ||error|| / ||reference||.
        cosine: Cosine of the angle between the two, as vectors.
        sqnr_db: 10 log10(sum reference^2 / sum error^2), dB.
        psnr_db: 20 log10(range / rms(error)), dB.
        problem: Why the numbers cannot be trusted (NaN, Inf, a different shape or dtype); empty when they can.
        integer: True for integers and booleans, which have to be equal unless --atol or --rtol is given.
        histogram: Counts of log10(|error| / range) in bins of one decade, from `HISTOGRAM_EDGES`; the first also counts exact zeros.
        excess: max of |error| / (atol + rtol |reference|), at most 1 within these bounds; None where neither was set.
    """

    case: str
    output: str
    shape: tuple[int, ...]
    max_abs: Decibel
    mean_abs: Decibel
    range: Decibel
    max_relative: Decibel
    relative_l2: Decibel
    cosine: Decibel
    sqnr_db: Decibel
    psnr_db: Decibel
    problem: str = ""
    integer: bool = False
    histogram: tuple[int, ...] = ()
    excess: Decibel | None = None


HISTOGRAM_EDGES: tuple[int, ...] = tuple(range(-9, 2))
"""Decades of |error| / range: below 1e-9, 1e-9 to 1e-8, …, 1 to 10, above. `len(histogram) == len(HISTOGRAM_EDGES) + 1`."""


class StageResult(_Strict):
    """What one verification stage found.

    Attributes:
        name: `torch`, `torch-dtype`, `onnx`, `native`, `quantized`, `sampler`, `plan`, `mil`, `coreai` or `device`.
        verdict: See `Verdict`.
        reason: Why the verdict is not `verified`; empty when it is.
        metrics: One row for each case and output.
        device: What executed it.
        tolerance: The bounds that its outputs were held to; None for the manifest's.
        sample_tolerance: The bounds that its pictures (case `samples`) were held to; None when there were none.
    """

    name: str
    verdict: Verdict
    reason: str = ""
    metrics: tuple[OutputMetrics, ...] = ()
    device: str = ""
    tolerance: dict[str, float] | None = None
    sample_tolerance: dict[str, float] | None = None


class TensorInfo(_Strict):
    """One input or output of the artifact.

    Attributes:
        name: Its name.
        dtype: numpy's name for its element type.
        shape: Sizes; a string names a dynamic size.
        range: Smallest and largest value seen in the reference cases, None for empty or boolean tensors.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    range: tuple[Decibel, Decibel] | None = None


class Column(_Strict):
    """One column of a `Table`.

    Attributes:
        name: Its heading.
        kind: How its values are written: `text`, `code`, `count` (integers), `number`, `size` (bytes), `decibel`, or `share` (0 to 1, a
            bar).
    """

    name: str
    kind: Literal["text", "code", "count", "number", "size", "decibel", "share"] = "text"


class Table(_Strict):
    """Figures that a target gives the report.

    Attributes:
        name: A short name of letters and hyphens, unique in the report.
        title: What people read above it.
        lead: One or two sentences on what it shows.
        columns: Its columns.
        rows: Its rows, with a value for each column; None where there is none.
    """

    name: Annotated[str, Field(pattern=r"\A[a-z][a-z0-9-]*\z")]
    title: str
    lead: str = ""
    columns: tuple[Column, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]

    @model_validator(mode="after")
    def _full(self) -> Table:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"the table {self.name} has a row of another length than {len(self.columns)}")
        return self


class WeightsInfo(_Strict):
    """Where the weights came from.

    Attributes:
        origin: `shipped`, `file`, `random` or `module` (the caller's own module).
        path: The file's name, without its folder; empty where there is none.
        layout: `isthmus` or the foreign layout that was converted.
        dtypes: Element types in the file, by safetensors' names (`F32`, `BF16`, …); floats are converted to the module's type.
        sha256: Of the file, or of the parameters' bytes where there is no file.
        parameters: Number of parameters and buffers' elements.
        bytes: Their size in bytes.
        seed: The seed of random weights.
        missing: Keys the module has and the file has not.
        unexpected: Keys the file has and the module has not.
    """

    origin: Literal["shipped", "file", "random", "module"]
    path: str = ""
    layout: str = "isthmus"
    dtypes: tuple[str, ...] = ()
    sha256: str = ""
    parameters: int = 0
    bytes: int = 0
    seed: int | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


class Manifest(_Strict):
    """The contents of `manifest.json`.

    Attributes:
        schema_: Version of this layout (`schema` in the file).
        model: The name asked for.
        target: The target's registered name.
        precision: The precision asked for.
        opset: ONNX opset of the lowered graph, None for targets without one.
        config: The model's settings.
        options: Every option of the export, as resolved.
        inputs: The artifact's inputs, in order.
        outputs: Its outputs, in order.
        sizes: Ranges of the dynamic sizes: name to (min, opt, max).
        weights: Where the weights came from.
        tolerance: The bounds that the verdict was given by.
        device: What the artifact is for.
        verdict: The weakest verdict of the stages that were run.
        stages: What each stage found.
        versions: Versions of the tools that made it.
        details: Figures of the target.
        files: Path (POSIX, relative) to sha256, for every file but the manifest.
    """

    schema_: int = Field(default=SCHEMA_VERSION, alias="schema", serialization_alias="schema")
    model: str
    target: str
    precision: str
    opset: int | None = None
    config: dict[str, Any] = {}
    options: dict[str, Any] = {}
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    sizes: dict[str, tuple[int, int, int]] = {}
    weights: WeightsInfo
    tolerance: dict[str, float] = {}
    device: str = ""
    verdict: Verdict
    stages: tuple[StageResult, ...]
    versions: dict[str, str] = {}
    details: dict[str, Any] = {}
    files: dict[str, str] = {}


def weakest(stages: Iterable[StageResult]) -> Verdict:
    """The weakest verdict of the stages that were run.

    Stages of PyTorch itself say nothing of the artifact: when only they were run, the verdict is at most `lowered`; when none was, it
    is `not run`.
    """
    ran = [s for s in stages if s.verdict != "not run"]
    verdicts: list[Verdict] = [s.verdict for s in ran]
    if ran and all(s.name in ("torch", "torch-dtype") for s in ran):
        verdicts.append("lowered")
    return min(verdicts, key=_WEAKEST_FIRST.index, default="not run")
