"""Operations that the Neural Engine lacks."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from .chips import chips_before
from .program import ProgramSubject

LACKING = frozenset({
    "acos", "asin", "atanh", "cosh", "sinh", "tan", "band_part", "cumsum", "gather", "gather_along_axis", "gather_nd",
    "logical_and", "logical_or", "logical_xor", "mod", "non_maximum_suppression", "non_zero", "one_hot", "random_bernoulli",
    "random_categorical", "random_normal", "random_uniform", "range_1d", "reduce_prod", "reverse_sequence", "scatter",
    "scatter_along_axis", "scatter_nd", "shape", "sliding_windows", "slice_update",
})  # fmt: skip
"""What no generation has."""

SINCE = {
    "sin": 15, "cos": 15, "reduce_argmin": 15, "topk": 14, "argsort": 14, "crop_resize": 14, "resample": 14, "affine": 14,
}  # fmt: skip
"""The generation (`chips`) that brought an operation."""

_FIXES = {
    "cumsum": "multiply by a triangular matrix: export with --layout ane",
    "gather": "multiply by a one-hot matrix: export with --layout ane; or look up before the model is called",
    "band_part": "store the mask",
    "one_hot": "compare with the stored numbers of the classes",
}


@register_rule(
    "ANE-401",
    summary="operation that the engine lacks",
    effect="leaves the engine",
    targets=("coreml",),
    fix="write it with products and elementwise operations, or compute it before the model is called",
    source="https://aneforge.readthedocs.io/en/latest/op-catalog/; https://github.com/hollance/neural-engine/blob/master/docs/unsupported-layers.md",
    reads="mil",
    verdict="likely",
)
def lacking(subject: ProgramSubject) -> Iterator[Match]:
    """An operation of `LACKING`."""
    for operation in subject.operations(*LACKING):
        yield subject.match(operation, f"{operation.op_type}, which the Neural Engine lacks", _FIXES.get(operation.op_type, ""))


@register_rule(
    "ANE-402",
    summary="loop or branch",
    effect="leaves the engine",
    targets=("coreml",),
    fix="unroll the loop, or call the model once a step",
    source="https://github.com/apple/coremltools/issues/2208; https://aneforge.readthedocs.io/en/latest/op-catalog/",
    reads="mil",
    verdict="likely",
)
def control_flow(subject: ProgramSubject) -> Iterator[Match]:
    """while_loop or cond: what is inside runs elsewhere as well."""
    for operation in subject.operations("while_loop", "cond"):
        yield subject.match(operation, f"{operation.op_type}, and the Neural Engine has no control flow")


@register_rule(
    "ANE-403",
    summary="LSTM, GRU or RNN",
    effect="leaves the engine",
    targets=("coreml",),
    fix="use convolutions, attention, or a scan in chunks (`isthmus list ops`)",
    source="https://github.com/apple/coremltools/issues/1780; https://github.com/hollance/neural-engine/blob/master/docs/unsupported-layers.md",
    reads="mil",
    verdict="likely",
)
def recurrent(subject: ProgramSubject) -> Iterator[Match]:
    """A recurrent cell as one operation."""
    for operation in subject.operations("lstm", "gru", "rnn"):
        yield subject.match(operation, f"{operation.op_type}, which the Neural Engine lacks")


@register_rule(
    "ANE-404",
    summary="operation that older engines lack",
    effect="leaves the engine",
    targets=("coreml",),
    fix="compute it before the model is called: sines of times and positions are a table, or an input",
    source="https://aneforge.readthedocs.io/en/latest/op-catalog/: sin and cos since A15, topk and sort since A14",
    reads="mil",
    verdict="likely",
)
def newer(subject: ProgramSubject) -> Iterator[Match]:
    """An operation of `SINCE`, and a chip of an older generation, or none named."""
    for operation in subject.operations(*SINCE):
        since = SINCE[operation.op_type]
        if subject.generation < since:
            yield subject.match(operation, f"{operation.op_type} at run time, which the engines of {chips_before(since)} lack")
