"""What the Attention operator may be in TensorRT."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ....exporter.lint import Match, register_rule
from ....exporter.passes._rewrite import attribute_int, dims
from ....exporter.subject import Subject

HEAD_SIZES = (16, 256)


@register_rule(
    "TRT-405",
    summary="Attention with a soft cap, a softmax precision, or outputs beside the result",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="write the attention as MatMul, Softmax and MatMul",
    source="measured with TensorRT-RTX 1.7.1: setting softcap, or softmax precision, is not supported; one output is expected",
)
def attention_form(subject: Subject) -> Iterator[Match]:
    """The node asks for what the importer has not."""
    for node in subject.nodes("Attention"):
        softcap = node.attributes.get("softcap")
        found = [
            *(["a soft cap"] if softcap is not None and (softcap.is_ref() or softcap.as_float() != 0.0) else []),
            *(["a softmax precision"] if "softmax_precision" in node.attributes else []),
            *(["outputs of keys, values or scores"] if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]) else []),
        ]
        if found:
            yield Match(f"Attention with {' and '.join(found)}", node)


@register_rule(
    "TRT-406",
    summary="Attention in float32",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="write the attention as MatMul, Softmax and MatMul, or cast Q, K and V to half precision",
    source="measured with TensorRT-RTX 1.7.1: attention operation was not supported by a dedicated kernel",
)
def attention_type(subject: Subject) -> Iterator[Match]:
    """The queries are float32."""
    for node in subject.nodes("Attention"):
        if node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT:
            yield Match("Attention in FLOAT, expected FLOAT16 or BFLOAT16", node)


@register_rule(
    "TRT-407",
    summary="Attention with a head size outside 16 to 256",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="write the attention as MatMul, Softmax and MatMul",
    source="measured with TensorRT-RTX 1.7.1: 16 to 256 build, 8 and 264 to 512 have no dedicated kernel",
)
def attention_head_size(subject: Subject) -> Iterator[Match]:
    """The size of a head is known and beyond the limits."""
    low, high = HEAD_SIZES
    for node in subject.nodes("Attention"):
        shape = dims(node.inputs[0])
        if not shape or not isinstance(shape[-1], int):
            continue
        heads = (attribute_int(node, "q_num_heads", 1) or 1) if len(shape) == 3 else 1
        size = shape[-1] // heads
        if not low <= size <= high:
            yield Match(f"Attention with a head size of {size}, expected {low} to {high}", node)
