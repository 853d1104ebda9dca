"""Forms that the Neural Engine prefers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ....exporter.lint import Match, register_rule
from .chips import chips_before
from .program import ProgramSubject, made_by, shape, stored, tensors

_MASKED = -40000.0
_WORTH = 2_000_000  # numbers in the queries, from which on Core ML prefers the engine for attention as one operation


@register_rule(
    "ANE-301",
    summary="linear layer that is no 1x1 convolution",
    effect="wasteful",
    targets=("coreml",),
    fix="export with --layout ane",
    source="https://github.com/apple/ml-ane-transformers; "
    "https://machinelearning.apple.com/research/neural-engine-transformers, principle 1",
    reads="mil",
    verdict="likely",
)
def linear(subject: ProgramSubject) -> Iterator[Match]:
    """linear, or matmul with a stored matrix: the channels are its last axis, and in the engine's layout the second."""
    for operation in subject.operations("linear", "matmul"):
        if operation.op_type == "linear" or (stored(operation.y) and len(shape(operation.y)) == 2):
            yield subject.match(operation, f"{operation.op_type} with channels on the last axis")


@register_rule(
    "ANE-302",
    summary="small attention that is not computed head by head",
    effect="leaves the engine",
    targets=("coreml",),
    fix="export with --attention split-einsum",
    source="https://github.com/vx-lang/Vx/issues/437, MLComputePlan: the CPU below some 2 million numbers in the queries; "
    "https://aneforge.readthedocs.io/en/latest/capabilities/: from 64 heads and 496 queries on; "
    "https://machinelearning.apple.com/research/neural-engine-transformers, principle 3",
    reads="mil",
    verdict="likely",
)
def attention(subject: ProgramSubject) -> Iterator[Match]:
    """scaled_dot_product_attention of fewer numbers than Core ML sends to the engine."""
    for operation in subject.operations("scaled_dot_product_attention"):
        sizes = shape(operation.query)
        if math.prod(sizes) < _WORTH:
            yield subject.match(operation, f"scaled_dot_product_attention with queries of shape {sizes}, which is little for the engine")


@register_rule(
    "ANE-303",
    summary="mask with minus infinity",
    effect="loses precision",
    targets=("coreml",),
    fix="mask with -40000: export with --layout ane",
    source="https://machinelearning.apple.com/research/neural-engine-transformers masks with -1e4; float16 ends at -65504",
    reads="mil",
    verdict="likely",
)
def infinite_mask(subject: ProgramSubject) -> Iterator[Match]:
    """A stored tensor or number below -40000 is added, selected, or filled in: infinities meet as NaN."""
    for operation in subject.operations("add", "select", "maximum", "fill", "sub", "scaled_dot_product_attention"):
        for variable in tensors(operation):
            value = getattr(variable, "val", None)
            if value is not None and np.asarray(value).dtype.kind == "f" and np.size(value) and np.min(value) < _MASKED:
                yield subject.match(operation, f"{operation.op_type} with {np.min(value):g}, expected {_MASKED:g} at the lowest")
                break


@register_rule(
    "ANE-304",
    summary="convolution with a kernel wider than 13",
    effect="leaves the engine",
    targets=("coreml",),
    fix="move the wide axis to the channels (space to depth), or split the kernel",
    source="https://aneforge.readthedocs.io/en/latest/capabilities/: 13 on M1, 15 on M5",
    reads="mil",
    verdict="likely",
)
def wide_kernel(subject: ProgramSubject) -> Iterator[Match]:
    """The last axis of the kernel is wider than 13; 15 from A16 on."""
    limit = 15 if subject.generation >= 16 else 13
    for operation in subject.operations("conv", "conv_transpose"):
        width = shape(operation.weight)[-1]
        if width > limit:
            only = "" if width > 15 or subject.chip else f" (on {chips_before(16)})"
            yield subject.match(operation, f"{operation.op_type} with a kernel of width {width}, the widest is {limit}{only}")


@register_rule(
    "ANE-305",
    summary="convolution whose weight is computed at run time",
    effect="leaves the engine",
    targets=("coreml",),
    fix="compute the weight before the export, or write the convolution as einsum",
    source="https://aneforge.readthedocs.io/en/latest/capabilities/: reachable at batch 1 only",
    reads="mil",
    verdict="likely",
)
def computed_weight(subject: ProgramSubject) -> Iterator[Match]:
    """The weight of a convolution is no stored tensor."""
    for operation in subject.operations("conv", "conv_transpose"):
        if not stored(operation.weight):
            maker = operation.weight.op.op_type if operation.weight.op is not None else "an input"
            yield subject.match(operation, f"{operation.op_type} whose weight comes out of {maker}")


@register_rule(
    "ANE-306",
    summary="transpose between two operations of the engine",
    effect="wasteful",
    targets=("coreml",),
    fix="export with --layout ane and --attention split-einsum, which leave one transpose for each attention",
    source="https://machinelearning.apple.com/research/neural-engine-transformers, principle 2: as few memory copies as can be",
    reads="mil",
    verdict="likely",
)
def transposes(subject: ProgramSubject) -> Iterator[Match]:
    """A transpose of a computed tensor, the one of the keys that split attention needs excepted."""
    for operation in subject.operations("transpose"):
        used = [use for variable in operation.outputs for use in variable.child_ops]
        if len(shape(operation.x)) == 4 and shape(operation.outputs[0])[2] == 1 and all(use.op_type in ("split", "einsum") for use in used):
            continue
        if made_by(operation.x, "const") is None:
            fix = "write what is around it so that the positions stay last" if subject.laid_out else ""
            yield subject.match(operation, f"transpose of rank {len(shape(operation.x))}, which copies the tensor", fix)
