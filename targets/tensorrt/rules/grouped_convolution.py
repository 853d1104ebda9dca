"""FP8 on convolutions of several groups."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.passes._rewrite import attribute_int
from ....exporter.subject import Subject
from ..quantized import product


@register_rule(
    "TRT-109",
    summary="Q/DQ on a grouped or depthwise convolution",
    effect="wasteful",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="leave the convolution in half precision",
    source="https://github.com/NVIDIA/TensorRT/issues/4524: no optimised FP8 kernels for grouped and depthwise convolutions",
)
def grouped_convolution(subject: Subject) -> Iterator[Match]:
    """A Conv of more than one group reads FP8."""
    for node in subject.nodes("Conv"):
        found, groups = product(node), attribute_int(node, "group", 1)
        if found is not None and groups != 1 and (found.a.fp8 or found.b.fp8):
            yield Match(f"a convolution of {groups} groups is quantised to FP8", node)
