"""Element types that TensorRT does not have, or not together."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ....exporter.lint import Match, register_rule
from ....exporter.passes._rewrite import attribute_int, input_at
from ....exporter.subject import Subject
from ..quantized import E4M3, element_type, type_of_code

_OTHER_FP8 = (ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2FNUZ)
_NOT_THERE = (
    ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
    ir.DataType.COMPLEX64, ir.DataType.COMPLEX128, ir.DataType.STRING,
)  # fmt: skip
_INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.INT64)


@register_rule(
    "TRT-301",
    summary="FP8 of another format than E4M3FN",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="quantise to FLOAT8E4M3FN",
    source="measured with TensorRT-RTX 1.7.1: the initializer cannot be imported; "
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-schemes.html",
)
def fp8_format(subject: Subject) -> Iterator[Match]:
    """A value is of another FP8 type."""
    yield from _values_of(subject, _OTHER_FP8)


@register_rule(
    "TRT-302",
    summary="FP8 scale of another type than the tensor",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="store the scale in the type of the tensor that is quantised",
    source="measured with TensorRT-RTX 1.7.1: input types differ, or type mismatch between matmul operand scales",
)
def scale_type(subject: Subject) -> Iterator[Match]:
    """The scale of a QuantizeLinear differs from its input, or that of a DequantizeLinear from what it is asked to make."""
    for node in subject.nodes("QuantizeLinear", "DequantizeLinear"):
        source, scale = node.inputs[0], input_at(node, 1)
        if source is None or scale is None or scale.dtype is None:
            continue
        if node.op_type == "QuantizeLinear":
            expected = source.dtype if element_type(node.outputs[0]) == E4M3 else None
        else:
            code = attribute_int(node, "output_dtype", 0) if element_type(source) == E4M3 else 0
            expected = type_of_code(code)
        if expected is not None and scale.dtype not in (expected, ir.DataType.FLOAT8E8M0):
            yield Match(f"a {expected} tensor has a {scale.dtype} scale", node)


@register_rule(
    "TRT-303",
    summary="FLOAT8E8M0 scales",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="store the scale in the type of the tensor that is quantised",
    source="measured with TensorRT-RTX 1.7.1: the initializer cannot be imported",
)
def e8m0(subject: Subject) -> Iterator[Match]:
    """A value is of this type."""
    yield from _values_of(subject, (ir.DataType.FLOAT8E8M0,))


@register_rule(
    "TRT-304",
    summary="FP8 in an opset that this was not tried with",
    effect="unproven",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="export with --opset 23 or 24",
    source="https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html; "
    "measured with TensorRT-RTX 1.7.1 for opsets 19 to 24",
)
def fp8_opset(subject: Subject) -> Iterator[Match]:
    """There is FP8, and the opset is not one of 19 to 24."""
    if not 19 <= subject.opset <= 24 and any(element_type(value) == E4M3 for value, _ in subject.values()):
        yield Match(f"FP8 in opset {subject.opset}, expected 19 to 24")


@register_rule(
    "TRT-307",
    summary="element type that TensorRT does not have",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="cast to float16, bfloat16, float32, int32 or int64",
    source="measured with TensorRT-RTX 1.7.1: failed to convert ONNX data type",
)
def missing_type(subject: Subject) -> Iterator[Match]:
    """A value is of such a type."""
    yield from _values_of(subject, _NOT_THERE)


@register_rule(
    "TRT-306",
    summary="matrix product of integers",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="cast both operands to a floating-point type",
    source="measured with TensorRT-RTX 1.7.1: invalid type, for MatMul and Einsum of int32 and int64",
)
def integer_product(subject: Subject) -> Iterator[Match]:
    """A product reads integers."""
    for node in subject.nodes("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"):
        source = node.inputs[0]
        if source is not None and source.dtype in _INTEGERS:
            yield Match(f"{node.op_type} of {source.dtype}", node)


def _values_of(subject: Subject, types: tuple[ir.DataType, ...]) -> Iterator[Match]:
    for value, node in subject.values():
        if (found := element_type(value)) in types:
            user = node or next((use.node for use in value.uses()), None)
            yield Match(f"a tensor is {found}", user, where="" if user is not None else value.name or "")
