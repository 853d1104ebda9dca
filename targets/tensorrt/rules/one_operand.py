"""Products of which only one operand is FP8, so that half precision multiplies them."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.subject import Subject
from ..quantized import PRODUCTS, product
from .concatenated import behind_concat


@register_rule(
    "TRT-103",
    summary="layer of which only the weight, or only the activation, is FP8",
    effect="loses fp8",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="put Q/DQ on both operands, or on neither",
    source="measured with TensorRT-RTX 1.7.1: weight-only FP8 multiplies in half precision",
)
def one_operand(subject: Subject) -> Iterator[Match]:
    """One operand is FP8, the other is not, and one of them is a weight. Products of activations are the rules' of attention."""
    for node in subject.nodes(*PRODUCTS):
        found = product(node)
        if found is None or found.a.fp8 == found.b.fp8 or not (found.a.weight or found.b.weight):
            continue
        only, other = (found.a, found.b) if found.a.fp8 else (found.b, found.a)
        if behind_concat(other):
            continue  # which is the fault that another rule reports
        yield Match(f"only the {'weight' if only.weight else 'activation'} is FP8", node)
