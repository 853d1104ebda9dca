"""Numbers that float16, or the engine's way of computing in it, does not hold."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ....exporter.lint import Match, register_rule
from .chips import chips_before
from .program import Operation, ProgramSubject, Variable, casts_away, dtype, made_by, number, shape

_PRODUCT = 32752
_SLICE = 4094
_EXACT = 2048
_PRODUCTS = ("matmul", "linear", "einsum", "conv", "conv_transpose", "scaled_dot_product_attention")
_SCALES = ("mul", "add", "sub", "cast", "reshape", "expand_dims", "squeeze", "transpose")


@register_rule(
    "ANE-501",
    summary="product that may leave the engine's sums",
    effect="loses precision",
    targets=("coreml",),
    fix="scale the activations or the weight down before the product, and the result up after it",
    source="https://github.com/sbryngelson/ANEForge/blob/main/docs/numeric-cliffs.md: sums above 32752 are infinite, on M2 and M5",
    reads="mil",
    verdict="likely",
)
def large_product(subject: ProgramSubject) -> Iterator[Match]:
    """The largest |result| that was seen of a product, on example inputs, is above 32752. Without recorded peaks nothing is found."""
    for operation in subject.operations(*_PRODUCTS):
        peak = subject.peak(operation.outputs[0])
        if peak is not None and peak > _PRODUCT:
            yield subject.match(operation, f"{operation.op_type} whose results reach {peak:.4g}, and the engine's sums end at {_PRODUCT}")


@register_rule(
    "ANE-502",
    summary="count of more than 2048",
    effect="loses precision",
    targets=("coreml",),
    fix="sum in parts, or take the mean",
    source="https://github.com/sbryngelson/ANEForge/blob/main/docs/numeric-cliffs.md: float16 has no odd integers above 2048",
    reads="mil",
    verdict="likely",
)
def large_count(subject: ProgramSubject) -> Iterator[Match]:
    """A sum of more than 2048 numbers that are truth values or integers, in float16 or in int32, which becomes float16 there."""
    for operation in subject.operations("reduce_sum", "cumsum"):
        source = casts_away(operation.x)
        whole = dtype(source) == "bool" or dtype(source).startswith(("int", "uint"))
        terms = math.prod(shape(operation.x)) // max(1, math.prod(shape(operation.outputs[0])))
        if operation.op_type == "cumsum":
            terms = shape(operation.x)[int(operation.axis.val) if operation.axis is not None else 0]
        if whole and terms > _EXACT:
            yield subject.match(operation, f"{operation.op_type} of {terms} integers, which are exact in float16 to {_EXACT}")


@register_rule(
    "ANE-503",
    summary="cut of large values that does not start at the last axis's first",
    effect="loses precision",
    targets=("coreml",),
    fix="cut another axis, as split attention cuts the channels, or scale the values down",
    source="https://github.com/sbryngelson/ANEForge/blob/main/docs/numeric-cliffs.md: above 4094 they become infinite before A16",
    reads="mil",
    verdict="likely",
)
def offset_cut(subject: ProgramSubject) -> Iterator[Match]:
    """Slice or split along the last axis, of values that were seen above 4094, on a chip before A16."""
    if subject.generation >= 16:
        return
    for operation in subject.operations("slice_by_index", "split"):
        peak = subject.peak(operation.x)
        if peak is not None and peak > _SLICE and _cuts_last(operation):
            yield subject.match(
                operation, f"{operation.op_type} along the last axis of values to {peak:.4g}, above {_SLICE} on {chips_before(16)}"
            )


def _cuts_last(operation: Operation) -> bool:
    rank = len(shape(operation.x))
    if operation.op_type == "split":
        return bool(int(operation.axis.val) % rank == rank - 1)
    begin = operation.begin.val
    masked = operation.begin_mask is not None and operation.begin_mask.val is not None and bool(operation.begin_mask.val[-1])
    return begin is not None and int(begin[-1]) != 0 and not masked


@register_rule(
    "ANE-504",
    summary="root mean square whose squares leave float16",
    effect="loses precision",
    targets=("coreml",),
    fix="divide by the largest absolute value first, as --layout ane does",
    source="https://huggingface.co/blog/anemll/anemll-style-rms-ane: squares of more than 255 are infinite in float16",
    reads="mil",
    verdict="likely",
)
def squares(subject: ProgramSubject) -> Iterator[Match]:
    """The rsqrt or sqrt of a mean or sum of squares in float16, of values that were not divided by their largest."""
    for operation in subject.operations("rsqrt", "sqrt", "pow"):
        mean = _behind(operation.x, "reduce_mean", "reduce_sum")
        if mean is None or dtype(mean.x) != "fp16":
            continue
        base = _squared(mean.x)
        if base is None or made_by(base, "real_div", "sub", "softmax", "sigmoid", "tanh") is not None:
            continue
        peak = subject.peak(base)
        if peak is None or peak > math.sqrt(float(np.finfo(np.float16).max)):
            seen = "of any size" if peak is None else f"that reach {peak:.4g}"
            yield subject.match(operation, f"{operation.op_type} of squares of values {seen}; float16 holds those of 255")


@register_rule(
    "ANE-505",
    summary="division by the largest absolute value without a bound from below",
    effect="loses precision",
    targets=("coreml",),
    fix="bound the divisor from below, as --layout ane does",
    source="coremltools 9.0's rms_norm: a row of zeros is divided by zero and becomes NaN",
    reads="mil",
    verdict="likely",
)
def unguarded(subject: ProgramSubject) -> Iterator[Match]:
    """real_div by a maximum of |x| that may be zero."""
    for operation in subject.operations("real_div"):
        largest = made_by(casts_away(operation.y), "reduce_max")
        if largest is not None and made_by(largest.x, "abs") is not None:
            yield subject.match(operation, "real_div by max |x|, which is 0 for a row of zeros")


def _behind(variable: Variable, *kinds: str) -> Operation | None:
    """The operation of one of these types that a variable comes out of, through scalings and additions of numbers."""
    for _ in range(8):
        operation = getattr(variable, "op", None)
        if operation is None or operation.op_type in kinds:
            return operation
        if operation.op_type not in _SCALES:
            return None
        if operation.op_type in ("mul", "add", "sub"):
            variable = operation.x if number(operation.y) is not None else operation.y if number(operation.x) is not None else None
        else:
            variable = operation.x
    return None


def _squared(variable: Variable) -> Variable | None:
    operation = made_by(variable, "square", "mul", "pow")
    if operation is None or (operation.op_type == "mul" and operation.x is not operation.y):
        return None
    return operation.x if operation.op_type != "pow" or number(operation.y) == 2 else None
