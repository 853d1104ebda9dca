"""Attributes and sizes beyond which TensorRT refuses an operator that it has."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.passes._rewrite import input_at, ints
from ....exporter.subject import Subject

TOP_K = 3840


@register_rule(
    "TRT-403",
    summary="scatter with a reduction",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="scatter without reduction, or write the sum as a product with a one-hot matrix",
    source="measured with TensorRT-RTX 1.7.1: unsupported reduction type",
)
def scatter_with_reduction(subject: Subject) -> Iterator[Match]:
    """ScatterND or ScatterElements has a reduction other than none."""
    for node in subject.nodes("ScatterND", "ScatterElements"):
        attribute = node.attributes.get("reduction")
        if attribute is not None and not attribute.is_ref() and attribute.as_string() != "none":
            yield Match(f"{node.op_type} with the reduction {attribute.as_string()}", node)


@register_rule(
    "TRT-404",
    summary="TopK of more than 3840",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="take fewer, or take the largest of parts first",
    source="measured with TensorRT-RTX 1.7.1: K exceeds the maximum value allowed (3840)",
)
def top_k(subject: Subject) -> Iterator[Match]:
    """K is a constant above the limit."""
    for node in subject.nodes("TopK"):
        k = ints(input_at(node, 1))
        if k and k[0] > TOP_K:
            yield Match(f"TopK of {k[0]}, expected at most {TOP_K}", node)
