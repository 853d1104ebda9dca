"""What is said of one module: how far its result is from PyTorch's, how much of that it injected, and from where on that is too much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .metrics import DEFAULT_TOLERANCES, compare

Array = np.ndarray[Any, Any]

DEFAULT_THRESHOLDS: Mapping[str, float] = {
    # One module's own error, ||a - f|| / ||f||, and not what has added up before it. Reordered sums of float32 (u = 6e-8) give 1e-7 to
    # 1e-6 in the modules of DiT, SANA and DiffuSSM; the two forms of GELU are 1e-5 to 3e-4 apart.
    "fp32": 1e-5,
    # u = 2^-11 = 4.9e-4, a rms rounding error of 2e-4: a layer rounds its operands, weights and result, which gives 4e-4. Five times that.
    "fp16": 2e-3,
    # u = 2^-8, eight times fp16's.
    "bf16": 1.6e-2,
    # E4M3, u = 2^-4: an operand's rms error is 2.6 % of it, two of them make 3.7 %; attention has two products and a softmax: 4.5 %.
    "fp8": 0.1,
}
"""By precision, the relative error above which a module is said to have gone wrong. For the others see `threshold_of`."""


def threshold_of(precision: str, min_psnr: float | None = None) -> float:
    """The relative error above which a module is said to have gone wrong.

    A quantised artifact is held to a PSNR, which follows from what a layer may lose: ten layers in a row cost 10 dB, and the range of an
    output, 8 of its standard deviations, gives 18 dB back (see `metrics.DEFAULT_TOLERANCES`). One module may then lose 8 dB less than that.

    Args:
        precision: The precision of the stage.
        min_psnr: The PSNR that the artifact is held to, dB, for a precision that is not among `DEFAULT_THRESHOLDS`.
    """
    if precision in DEFAULT_THRESHOLDS:
        return DEFAULT_THRESHOLDS[precision]
    bound = min_psnr if min_psnr is not None else (DEFAULT_TOLERANCES[precision].min_psnr if precision in DEFAULT_TOLERANCES else None)
    return DEFAULT_THRESHOLDS["fp8"] if bound is None else float(10 ** ((8 - bound) / 20))


ROUNDOFF = 2.0**-24
"""The unit roundoff of float32, in which every program is given its inputs."""

SENSITIVITY = 8.0
"""An error is no fault where it is at most this many times what a rounding of the module's arguments to float32 does to it. A sine of a
timestep is such a case: its argument of up to 1000 is rounded, which is 1000 u of its result. A narrower type is no such excuse: what it
costs a module is to be known."""


@dataclass(frozen=True)
class Figures:
    """How far a tensor is from another.

    Attributes:
        relative_l2: ||error|| / ||reference||; inf where `problem` is not empty.
        sqnr_db: 10 log10(sum reference^2 / sum error^2), dB.
        max_abs: max |error|.
        problem: Why there are no numbers (NaN, Inf, another shape); empty when there are.
    """

    relative_l2: float
    sqnr_db: float
    max_abs: float
    problem: str = ""

    def value(self) -> dict[str, Any]:
        """As JSON values; what is not finite as a string."""
        figures = {"relative_l2": self.relative_l2, "sqnr_db": self.sqnr_db, "max_abs": self.max_abs}
        return {**{k: v if math.isfinite(v) else str(v) for k, v in figures.items()}, **({"problem": self.problem} if self.problem else {})}


@dataclass(frozen=True)
class Row:
    """One call of a module.

    Attributes:
        module: Its path; from its second call on with the call's number, as in `blocks.0#2`. Empty for the outermost.
        kind: The name of its class.
        order: When its error was found, counted over the whole run.
        total: The program's result against PyTorch's; None where it is not visible.
        inherited: PyTorch's result on the program's values against PyTorch's own.
        injected: The program's result against PyTorch's on the program's values; the worst where it was checked in several places.
        at: Where `injected` was found: `output`, or the input of a module inside it.
        nodes: What it became: operator and name of each node of its own.
        reason: Why it is not visible; empty when it is.
        case: The case that the figures are from.
        sensitivity: The relative error that rounding its arguments to float32 causes; measured where `injected` is over the threshold.
    """

    module: str
    kind: str
    order: int
    total: Figures | None = None
    inherited: Figures | None = None
    injected: Figures | None = None
    at: str = "output"
    nodes: tuple[str, ...] = ()
    reason: str = ""
    case: str = ""
    sensitivity: float = 0.0

    @property
    def visible(self) -> bool:
        """Whether there is a figure."""
        return self.injected is not None or self.total is not None

    @property
    def error(self) -> float:
        """The relative error that it injected; -1 where that is not known."""
        return self.injected.relative_l2 if self.injected is not None else -1.0

    @property
    def excused(self) -> bool:
        """Whether a rounding of its arguments explains the error."""
        return self.error <= SENSITIVITY * self.sensitivity

    def value(self) -> dict[str, Any]:
        """As JSON values."""
        figures = {name: getattr(self, name) for name in ("total", "inherited", "injected")}
        return {
            "module": self.module,
            "kind": self.kind,
            "order": self.order,
            **{name: f.value() if f is not None else None for name, f in figures.items()},
            "at": self.at,
            "nodes": list(self.nodes),
            "reason": self.reason,
            "case": self.case,
            "sensitivity": self.sensitivity if math.isfinite(self.sensitivity) else str(self.sensitivity),
        }


def merged(rows: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of several cases as one: of every call, the row with the largest injected error that nothing excuses."""
    best: dict[str, Row] = {}
    for row in (row for case in rows for row in case):
        before = best.get(row.module)
        if before is None or (not row.excused, row.error) > (not before.excused, before.error):
            best[row.module] = row
    return sorted(best.values(), key=lambda row: row.order)


def over(rows: Sequence[Row], threshold: float) -> list[Row]:
    """The rows whose module injects more than the threshold, the first first."""
    return [row for row in rows if row.injected is not None and not row.error <= threshold and not row.excused]


def measured(reference: Array, array: Array) -> Figures:
    """How far an array is from its reference."""
    metrics = compare(reference, array, case="", output="")
    return Figures(metrics.relative_l2, metrics.sqnr_db, metrics.max_abs, metrics.problem)


def measured_if_finite(reference: Array, array: Array) -> Figures | None:
    """The same; None where the reference itself is not finite, so that nothing can be said of the other."""
    if reference.dtype.kind == "f" and not np.isfinite(reference).all():
        return None
    return measured(reference, array)
