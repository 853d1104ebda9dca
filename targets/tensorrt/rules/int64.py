"""Activations that are computed in INT64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from ....exporter.lint import Match, register_rule
from ....exporter.passes._rewrite import dims, is_op
from ....exporter.subject import Subject

_ARITHMETIC = (
    "Abs", "Add", "Clip", "CumSum", "Div", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Relu", "Sign", "Sub", "Sum", "Where",
    "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum",
)  # fmt: skip
_FEW = 64  # elements: labels and the arithmetic of shapes cost nothing


@register_rule(
    "TRT-305",
    summary="activation computed in INT64",
    effect="wasteful",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="cast to int32, or to floating point, as early as possible",
    source="CUDA C++ Programming Guide, Arithmetic Instructions: 64-bit integers are computed in several 32-bit instructions",
)
def int64_activation(subject: Subject) -> Iterator[Match]:
    """Arithmetic in INT64 on more than a few elements that depend on what an input holds, and not only on its shape."""
    dependent = set(subject.model.graph.inputs)
    for scope in subject.scopes():
        for node in scope.graph:
            if is_op(node, "Shape", "Size") or not any(v in dependent for v in node.inputs if v is not None):
                continue
            dependent.update(node.outputs)
            result = node.outputs[0]
            if is_op(node, *_ARITHMETIC) and result.dtype == ir.DataType.INT64 and _elements(subject, result) > _FEW:
                yield Match(f"{node.op_type} of {ir.DataType.INT64} tensors", node)


def _elements(subject: Subject, value: ir.Value) -> int:
    """The number of elements; a size that is not known counts as 1."""
    return math.prod(subject.size(d) or 1 for d in dims(value) or [])
