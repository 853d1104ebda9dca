"""How far an artifact's outputs are from PyTorch's, and whether that is near enough.

`compare` measures one output, `check` holds the measurements against a `Tolerance`. The definitions are those of
`exporter.manifest.OutputMetrics`. Where a formula divides by zero:

==================================  =========================================================================================
no error at all                     every error is 0, cosine 1, SQNR and PSNR inf, whatever the reference is (also when empty)
reference constant (range 0)        any error makes max_relative inf and PSNR -inf
reference zero                      any error makes relative_l2 inf, SQNR -inf and cosine 0
artifact zero, reference not        cosine 0
`problem` is not empty              errors inf, SQNR and PSNR -inf, cosine nan, no histogram; range nan unless the reference is sound
==================================  =========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..exporter.errors import Reason
from ..exporter.manifest import HISTOGRAM_EDGES, OutputMetrics
from ..exporter.spec import Tolerance

Array = np.ndarray[Any, Any]
Float64 = np.ndarray[Any, np.dtype[np.float64]]

CHUNK = 2**18
"""Elements that are converted to float64 at a time: some 16 MiB of temporaries, whatever the tensor's size."""

_DECADES = 10.0 ** np.array(HISTOGRAM_EDGES, dtype=np.float64)

DEFAULT_TOLERANCES: Mapping[str, Tolerance] = {
    # Unit roundoff u = 2^-24 = 6e-8, but reductions are reordered: sums of some thousand terms, through tens of layers, reach a few 1e-6
    # of the output's range. 1e-5 leaves no room for a wrong epsilon, a GELU approximation or a swapped axis.
    "fp32": Tolerance(max_relative=1e-5),
    # u = 2^-11 = 4.9e-4. The range of an output is about 8 standard deviations, so that 60 dB (rms error 1e-3 of the range) is 16 u of
    # the standard deviation: what 16^2 = 256 independent roundings in a row add up to. The largest of a million normal errors is 5 rms;
    # twice that is the 1e-2.
    "fp16": Tolerance(min_psnr=60.0, max_relative=1e-2),
    # u = 2^-8, eight times fp16's: 18 dB less, rounded down to 40 dB (rms error 1e-2 of the range). The largest error again 10 rms.
    "bf16": Tolerance(min_psnr=40.0, max_relative=1e-1),
    # From here on every matrix product sees rounded operands, and single elements may be far off, so that only the PSNR is bounded.
    # E4M3 has u = 2^-4: an operand's rms error is about 2.6 % of it, two operands give a product 29 dB of SQNR. Ten such errors in a row
    # on the residual stream cost 10 dB, the range (8 standard deviations) gives back 18 dB: 37 dB are expected, 30 dB required.
    "fp8": Tolerance(min_psnr=30.0),
    # A step of 8/256 standard deviations gives an operand 41 dB of SQNR, but per-tensor activation ranges are set by outliers, which
    # cost ten decibels and more. The same bound as fp8's: rms error 3 % of the range, where a difference begins to show in a picture.
    "int8": Tolerance(min_psnr=30.0),
    # Weights only, in groups: 16 levels give a normal variable 20 dB of SQNR. Ten layers cost 10 dB, the range gives back 18 dB: 28 dB
    # are expected, 20 dB (rms error a tenth of the range) are required. Below that the output is another picture.
    "int4": Tolerance(min_psnr=20.0),
}
"""The bounds for each precision, for models that set none of their own. They tell a faithful artifact from a wrong one; they are not a
goal: the report shows how far inside them an artifact is."""


def compare(reference: Array, candidate: Array, *, case: str, output: str, tolerance: Tolerance | None = None) -> OutputMetrics:
    """Measures how far one output is from its reference.

    Everything is accumulated in float64, `CHUNK` elements at a time. Integers are subtracted exactly before that, so that two int64
    that float64 cannot tell apart still differ. Float tensors of different widths are compared by value.

    Args:
        reference: PyTorch's output, any shape; bool, integer or float (also bfloat16 and the other types of ml_dtypes).
        candidate: The artifact's.
        case: The case's name.
        output: The output's name.
        tolerance: Where it sets atol or rtol, `excess` is measured against them.

    Returns:
        The metrics. Nothing is raised for bad values: NaN, Inf, another shape or another kind of dtype is named in `problem`.
    """
    problem = _mismatch(reference, candidate)
    if problem:
        return _unusable(reference, case, output, problem)
    faults = [f"{side} has {what}" for side, array in (("reference", reference), ("artifact", candidate)) if (what := _faults(array))]
    if faults:
        return _unusable(reference, case, output, "; ".join(faults))
    return _measure(reference, candidate, case, output, tolerance).model_copy(update={"integer": reference.dtype.kind in "biu"})


@dataclass(frozen=True)
class Miss:
    """A bound that a measurement does not keep.

    Attributes:
        metric: The field of OutputMetrics: `problem`, `integer`, `max_relative`, `psnr_db` or `excess`.
        severity: How far outside, as a factor above 1 on the error; inf for a problem. For sorting.
        text: What was got and what was expected.
    """

    metric: str
    severity: float
    text: str


def misses(metrics: OutputMetrics, tolerance: Tolerance) -> list[Miss]:
    """Every bound of `tolerance` that one output does not keep, worst first. A NaN keeps no bound; a problem is always a miss."""
    if metrics.problem:
        return [Miss("problem", math.inf, metrics.problem)]
    if metrics.integer and tolerance.atol is None and tolerance.rtol is None:
        # A class, an index or a mask is right or wrong: how far apart two of them are says nothing.
        if metrics.max_abs == 0:
            return []
        text = f"an integer output differs by up to {metrics.max_abs:.3g}, expected equal values"
        return [Miss("integer", math.inf, text)]
    found = []
    # Each bound is asked for as `not (got <= bound)`, so that a NaN is a miss.
    if (bound := tolerance.max_relative) is not None and not metrics.max_relative <= bound:
        text = f"max |error| / range is {metrics.max_relative:.3g}, expected at most {bound:g}"
        found.append(Miss("max_relative", _ratio(metrics.max_relative, bound), text))
    if (bound := tolerance.min_psnr) is not None and not metrics.psnr_db >= bound:
        severity = 10.0 ** min((bound - metrics.psnr_db) / 20, 300.0) if math.isfinite(metrics.psnr_db) else math.inf
        found.append(Miss("psnr_db", severity, f"PSNR is {metrics.psnr_db:.3g} dB, expected at least {bound:g} dB"))
    if tolerance.atol is not None or tolerance.rtol is not None:
        atol, rtol = tolerance.atol or 0.0, tolerance.rtol or 0.0
        # Metrics that were taken without the tolerance hold no elementwise excess: max |error| <= atol implies the bound.
        excess = metrics.excess if metrics.excess is not None else _ratio(metrics.max_abs, atol)
        if not excess <= 1:
            text = f"|error| is up to {excess:.3g} times atol + rtol |reference|, expected at most 1 (atol {atol:g}, rtol {rtol:g})"
            found.append(Miss("excess", excess, text))
    return sorted(found, key=lambda miss: -miss.severity)


def check(metrics: Sequence[OutputMetrics], tolerance: Tolerance) -> list[Reason]:
    """Holds every output of every case against the tolerance.

    Returns:
        One reason for each bound that is missed, with got and expected, the worst first; empty when the artifact is near enough.
    """
    found = [(miss, m) for m in metrics for miss in misses(m, tolerance)]
    found.sort(key=lambda pair: -pair[0].severity)
    return [Reason(miss.text, where=f"case {m.case}, output {m.output}", fix=_fix(miss, m)) for miss, m in found]


def _fix(miss: Miss, metrics: OutputMetrics) -> str:
    if miss.metric in ("max_relative", "psnr_db") and metrics.range == 0:
        return "the reference is constant, so that no error is small beside its range: bound it with --atol and --rtol"
    return ""


def _kind(dtype: np.dtype[Any]) -> str:
    """`boolean`, `signed integer`, `unsigned integer`, `float`, or the dtype's own name where it cannot be compared."""
    # By name, because the types of ml_dtypes have numpy's kind "V".
    for kind, prefixes in _KINDS.items():
        if dtype.name.startswith(prefixes):
            return kind
    return dtype.name


_KINDS = {"boolean": ("bool",), "signed integer": ("int",), "unsigned integer": ("uint",), "float": ("float", "bfloat")}


def _mismatch(reference: Array, candidate: Array) -> str:
    problems = []
    kinds = _kind(reference.dtype), _kind(candidate.dtype)
    if kinds[0] not in _KINDS:
        problems.append(f"dtype {reference.dtype} cannot be compared")
    elif kinds[0] != kinds[1]:
        problems.append(f"artifact has dtype {candidate.dtype}, expected {reference.dtype}")
    if reference.shape != candidate.shape:
        problems.append(f"artifact has shape {list(candidate.shape)}, expected {list(reference.shape)}")
    return "; ".join(problems)


def _chunks(array: Array) -> Iterator[Array]:
    """The elements in C order, `CHUNK` at a time, each a 1-d array of the tensor's dtype; never a copy of the whole."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.flat
    for start in range(0, array.size, CHUNK):
        yield flat[start : start + CHUNK]


def _faults(array: Array) -> str:
    """How many NaN and Inf a tensor has and where the first of each is; empty for a sound one."""
    if _kind(array.dtype) != "float":
        return ""
    counts = {"NaN": 0, "Inf": 0}
    first: dict[str, int] = {}
    for number, chunk in enumerate(_chunks(array)):
        values = chunk.astype(np.float64)
        if np.isfinite(values).all():
            continue
        for name, mask in (("NaN", np.isnan(values)), ("Inf", np.isinf(values))):
            if mask.any():
                first.setdefault(name, number * CHUNK + int(mask.argmax()))
                counts[name] += int(mask.sum())
    found = []
    for name, position in first.items():
        index = ", ".join(str(i) for i in np.unravel_index(position, array.shape))
        found.append(f"{counts[name]} {name} of {array.size} values (the first at [{index}])")
    return " and ".join(found)


def _extremes(array: Array) -> tuple[float, float]:
    """Smallest and largest value of a sound tensor, as Python's own numbers: its integers do not overflow. Both 0 when it is empty."""
    bounds = [(chunk.min().item(), chunk.max().item()) for chunk in map(_wide, _chunks(array))]
    return (min(low for low, _ in bounds), max(high for _, high in bounds)) if bounds else (0.0, 0.0)


def _wide(chunk: Array) -> Array:
    """The same values as float64, int64 or uint64."""
    kind = _kind(chunk.dtype)
    return chunk.astype(np.float64 if kind == "float" else np.int64 if kind == "signed integer" else np.uint64)


def _measure(reference: Array, candidate: Array, case: str, output: str, tolerance: Tolerance | None) -> OutputMetrics:
    # First the extremes: the histogram needs the range, and the sums a power of two that keeps every square within float64.
    low, high = _extremes(reference)
    exponent = math.frexp(max(abs(value) for value in (low, high, *_extremes(candidate))))[1]
    exact = isinstance(low, int)
    extent = float(_scaled(high - low, exponent) if exact else _scaled(high, exponent) - _scaled(low, exponent))
    count = reference.size
    worst = errors = squared_errors = squared_reference = squared_candidate = product = 0.0
    histogram = np.zeros(len(HISTOGRAM_EDGES) + 1, dtype=np.int64)
    bounded = tolerance is not None and (tolerance.atol is not None or tolerance.rtol is not None)
    excess = 0.0
    for r, c in zip(map(_wide, _chunks(reference)), map(_wide, _chunks(candidate)), strict=True):
        x, y = _scaled(r, exponent), _scaled(c, exponent)
        error = _scaled(_distance(r, c), exponent) if exact else np.abs(y - x)
        worst = max(worst, float(error.max()))
        errors += float(error.sum())
        squared_errors += float(error @ error)
        squared_reference += float(x @ x)
        squared_candidate += float(y @ y)
        product += float(x @ y)
        histogram += np.bincount(np.searchsorted(_DECADES, _quotient(error, extent), side="right"), minlength=histogram.size)
        if tolerance is not None and bounded:
            allowed = float(_scaled(tolerance.atol or 0.0, exponent)) + (tolerance.rtol or 0.0) * np.abs(x)
            excess = max(excess, float(_quotient(error, allowed).max()))

    return OutputMetrics(
        case=case,
        output=output,
        shape=reference.shape,
        max_abs=_unscaled(worst, exponent),
        mean_abs=_unscaled(errors / count, exponent) if count else 0.0,
        range=_unscaled(extent, exponent),
        max_relative=_ratio(worst, extent),
        relative_l2=math.sqrt(_ratio(squared_errors, squared_reference)),
        cosine=_cosine(product, squared_reference, squared_candidate),
        sqnr_db=_decibels(squared_reference, squared_errors),
        psnr_db=_decibels(extent * extent * count, squared_errors),
        histogram=tuple(int(n) for n in histogram),
        excess=excess if bounded else None,
    )


def _scaled(values: Any, exponent: int) -> Any:
    """The values / 2^exponent in float64; exact, but for what is then below the smallest normal number."""
    # In two halves: 2^-exponent alone is not a float64 for the smallest subnormals.
    half = exponent // 2
    with np.errstate(over="ignore"):  # an absolute bound that is far above every value may become inf
        return np.ldexp(np.ldexp(np.asarray(values, dtype=np.float64), -half), half - exponent)


def _unscaled(value: float, exponent: int) -> float:
    with np.errstate(over="ignore"):  # the difference of two float64 can exceed float64: inf is then the answer
        return float(np.ldexp(value, exponent))


def _distance(a: Array, b: Array) -> Array:
    """|a - b| of int64 or uint64, exact, as uint64: subtraction modulo 2^64 is right whenever the true result fits, and it always does."""
    larger, smaller = np.maximum(a, b).view(np.uint64), np.minimum(a, b).view(np.uint64)
    difference: Array = larger - smaller
    return difference


def _quotient(numerator: Float64, denominator: Float64 | float) -> Float64:
    """The quotient of values of at least 0, with 0 / 0 = 0 and x / 0 = inf."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(numerator == 0, 0.0, numerator / denominator)


def _ratio(numerator: float, denominator: float) -> float:
    if numerator == 0:
        return 0.0
    return numerator / denominator if denominator else math.inf


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal else -math.inf


def _cosine(product: float, squared_a: float, squared_b: float) -> float:
    if squared_a == 0 or squared_b == 0:
        return 1.0 if squared_a == squared_b else 0.0
    # One root of the product, not a product of roots: exactly 1 for equal vectors.
    return max(-1.0, min(1.0, product / math.sqrt(squared_a * squared_b)))


def _unusable(reference: Array, case: str, output: str, problem: str) -> OutputMetrics:
    sound = _kind(reference.dtype) in _KINDS and not _faults(reference)
    low, high = _extremes(reference) if sound else (math.nan, math.nan)
    return OutputMetrics(
        case=case,
        output=output,
        shape=reference.shape,
        max_abs=math.inf,
        mean_abs=math.inf,
        range=high - low,
        max_relative=math.inf,
        relative_l2=math.inf,
        cosine=math.nan,
        sqnr_db=-math.inf,
        psnr_db=-math.inf,
        problem=problem,
    )
