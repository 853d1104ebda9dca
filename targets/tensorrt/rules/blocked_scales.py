"""Scales for blocks of a tensor."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.subject import Subject
from ..quantized import PRODUCTS, product


@register_rule(
    "TRT-104",
    summary="FP8 with a scale for each block",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="one scale for each output channel of a weight, and one for a whole activation",
    source="measured with TensorRT-RTX 1.7.1: CHECK(is_constant()) failed, for blocks of 32 and 128; "
    "with a half activation it builds, in half",
)
def blocked_scales(subject: Subject) -> Iterator[Match]:
    """An operand in FP8 has a block size, or a scale of more than one axis."""
    for node in subject.nodes(*PRODUCTS):
        found = product(node)
        for operand in (found.a, found.b) if found is not None else ():
            if operand.granularity == "block":
                yield Match(f"the {'weight' if operand.weight else 'activation'} has a scale for each block", node)
