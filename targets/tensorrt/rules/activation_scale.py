"""Activation scales other than one a tensor."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.subject import Subject
from ..quantized import PRODUCTS, product


@register_rule(
    "TRT-102",
    summary="product whose FP8 activation has a scale for each channel",
    effect="loses fp8",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="one scale for the whole tensor",
    source="measured with TensorRT-RTX 1.7.1; "
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-schemes.html",
)
def activation_scale_per_channel(subject: Subject) -> Iterator[Match]:
    """The scale of an operand that is no weight is a vector."""
    for node in subject.nodes(*PRODUCTS):
        found = product(node)
        for operand in (found.a, found.b) if found is not None else ():
            if not operand.weight and operand.granularity == "channel":
                yield Match("the scale of the activation is a vector, expected a scalar", node)
