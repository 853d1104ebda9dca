"""A Concat behind which no dequantised operand is left to fuse."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.passes._rewrite import is_op
from ....exporter.subject import Subject
from ..quantized import MOVES, PRODUCTS, Operand, operand, product

_WITH_CONCAT = frozenset({*MOVES, "Concat"})


def behind_concat(plain: Operand) -> bool:
    """Whether an operand is FP8 only when seen through a Concat."""
    if plain.fp8:
        return False
    seen = operand(plain.value, _WITH_CONCAT)
    return seen.fp8 and any(is_op(move, "Concat") for move in seen.moves)


@register_rule(
    "TRT-107",
    summary="Concat between DequantizeLinear and a product",
    effect="loses fp8",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="quantise after the Concat, with one scale for the whole",
    source="measured with TensorRT-RTX 1.7.1: DequantizeLinear fuses into the product that reads it, and into nothing through a Concat",
)
def concat_before_product(subject: Subject) -> Iterator[Match]:
    """An operand is FP8 only when seen through a Concat."""
    for node in subject.nodes(*PRODUCTS):
        found = product(node)
        for operand_ in (found.a, found.b) if found is not None else ():
            if behind_concat(operand_):
                yield Match("a Concat stands between DequantizeLinear and the product", node)
