"""Weights that are quantised when the engine is built."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.subject import Subject
from ..quantized import PRODUCTS, product


@register_rule(
    "TRT-106",
    summary="FP8 weight that the file stores in another type",
    effect="wasteful",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="store the weight as FLOAT8E4M3FN, and put DequantizeLinear alone behind it",
    source="https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html",
)
def stored_weights(subject: Subject) -> Iterator[Match]:
    """A constant goes through QuantizeLinear: the file is twice as large, and every build quantises again."""
    for node in subject.nodes(*PRODUCTS):
        found = product(node)
        for operand in (found.a, found.b) if found is not None else ():
            if operand.weight and operand.quantize is not None:
                stored = operand.quantize.inputs[0]
                yield Match(
                    f"the weight is stored as {stored.dtype if stored is not None else 'another type'} and quantised by a node", node
                )
