"""Weight scales that vary along the axis over which the product sums, which cannot be taken out of the sum."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.subject import Subject
from ..quantized import product


@register_rule(
    "TRT-101",
    summary="MatMul or Gemm whose FP8 weight has a scale for each input channel",
    effect="loses fp8",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="one scale for each output channel: axis 1 of a MatMul's weight, axis 0 of a Gemm's with transB",
    source="measured with TensorRT-RTX 1.7.1; "
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-schemes.html",
)
def weight_scale_along_the_sum(subject: Subject) -> Iterator[Match]:
    """The scale's axis, seen through transposes, is the product's inner axis."""
    for node in subject.nodes("MatMul", "Gemm"):
        found = product(node)
        for operand, inner in zip((found.a, found.b), found.inner, strict=True) if found is not None else ():
            if operand.weight and operand.granularity == "channel" and inner is not None and operand.axis == inner:
                yield Match(f"the scale of the weight varies along axis {inner}, over which the product sums", node)


@register_rule(
    "TRT-105",
    summary="Conv whose FP8 weight has a scale for each input channel",
    effect="loses fp8",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="one scale for each output channel: axis 0",
    source="measured with TensorRT-RTX 1.7.1; https://github.com/NVIDIA/TensorRT/issues/4560 is how it shows on an H100",
)
def convolution_scale_axis(subject: Subject) -> Iterator[Match]:
    """The axis of the scales of a Conv's weight is not 0."""
    for node in subject.nodes("Conv"):
        found = product(node)
        if found is not None and found.b.granularity == "channel" and found.b.axis not in (0, None):
            yield Match(f"the scale of the weight varies along axis {found.b.axis}, expected 0", node)
