"""Rounding to FP8 in front of a plugin that computes in half precision."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.subject import Subject
from ..quantized import operand
from .plugins import is_plugin


@register_rule(
    "TRT-108",
    summary="Q/DQ in front of a plugin that reads half precision",
    effect="wasteful",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="take the Q/DQ away, or give the plugin the FP8 tensor itself",
    source="measured with TensorRT-RTX 1.7.1: a plugin's input is a tensor in memory, so that both conversions run and fuse into nothing",
)
def half_plugin(subject: Subject) -> Iterator[Match]:
    """An activation that a plugin reads comes out of QuantizeLinear and DequantizeLinear."""
    for node in subject.nodes():
        if is_plugin(node) and any(o.fp8 and not o.weight for v in node.inputs if v is not None for o in [operand(v)]):
            yield Match(f"an input of {node.op_type} is rounded to FP8 and converted back", node)
