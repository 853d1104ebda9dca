"""FP8 attention: which Q/DQ nodes it needs, and where the scale has to be."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.subject import Subject
from ..quantized import operand, written_attentions


@register_rule(
    "TRT-201",
    summary="Attention node with Q/DQ on its inputs",
    effect="loses fp8",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="write the attention as MatMul, Softmax and MatMul, with Q/DQ on Q, K, V and the softmax's output",
    source="measured with TensorRT-RTX 1.7.1; https://github.com/NVIDIA/TensorRT/issues/4516",
)
def attention_node(subject: Subject) -> Iterator[Match]:
    """The node has no place for the softmax's Q/DQ, and computes in half."""
    for node in subject.nodes("Attention"):
        if any(v is not None and operand(v).fp8 for v in node.inputs[:3]):
            yield Match("an Attention node reads FP8 and multiplies in half precision", node)


@register_rule(
    "TRT-202",
    summary="attention of which Q, K and V are not all FP8",
    effect="loses fp8",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="put Q/DQ on Q, K and V and on the softmax's output, or on none of them",
    source="measured with TensorRT-RTX 1.7.1; https://github.com/NVIDIA/TensorRT/issues/4516",
)
def attention_operands(subject: Subject) -> Iterator[Match]:
    """One of the two products lacks an operand in FP8."""
    for found in written_attentions(subject.nodes("Softmax")):
        half = [name for name in "QKV" if not found.operands[name].fp8]
        if found.fp8 and half:
            yield Match(f"{' and '.join(half)} {'are' if len(half) > 1 else 'is'} not quantised, other operands are", found.first.node)


@register_rule(
    "TRT-203",
    summary="attention in FP8 without Q/DQ on the softmax's output",
    effect="loses fp8",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="put Q/DQ with the scale 1/448 on the softmax's output",
    source="measured with TensorRT-RTX 1.7.1; https://github.com/NVIDIA/TensorRT/issues/4516; "
    "https://github.com/NVIDIA/Model-Optimizer/pull/1289",
)
def softmax_output(subject: Subject) -> Iterator[Match]:
    """Q, K and V are FP8, and the second product multiplies half precision."""
    for found in written_attentions(subject.nodes("Softmax")):
        operands = found.operands
        if all(operands[name].fp8 for name in "QKV") and not found.second.a.fp8:
            yield Match("the softmax's output is not quantised, Q, K and V are", found.softmax)


@register_rule(
    "TRT-204",
    summary="attention in FP8 that scales the scores and not Q or K",
    effect="loses fp8",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="multiply Q or K by the scale, before its Q/DQ",
    source="https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-fused-attention.html",
)
def scale_before_the_product(subject: Subject) -> Iterator[Match]:
    """A constant is multiplied in between the first product and the softmax."""
    for found in written_attentions(subject.nodes("Softmax")):
        if found.fp8 and found.scales_after:
            yield Match("the scale is multiplied in after the first product", found.first.node)


@register_rule(
    "TRT-205",
    summary="attention in FP8 with a head size that is no multiple of 16",
    effect="loses fp8",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="pad the heads with zeros to a multiple of 16, or leave this attention in half precision",
    source="https://github.com/NVIDIA/Model-Optimizer quantises attention only where head_dim % 16 == 0",
)
def head_multiple(subject: Subject) -> Iterator[Match]:
    """The head size is known and not a multiple of 16."""
    for found in written_attentions(subject.nodes("Softmax")):
        if found.fp8 and found.head_size is not None and found.head_size % 16:
            yield Match(f"a head size of {found.head_size}, expected a multiple of 16", found.first.node)


@register_rule(
    "TRT-206",
    summary="attention in FP8 with a head size above 256",
    effect="loses fp8",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="split the heads, or leave this attention in half precision",
    source="measured with TensorRT-RTX 1.7.1: 512 does not fuse; "
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-fused-attention.html",
)
def head_limit(subject: Subject) -> Iterator[Match]:
    """The head size is known and above 256."""
    for found in written_attentions(subject.nodes("Softmax")):
        if found.fp8 and found.head_size is not None and found.head_size > 256:
            yield Match(f"a head size of {found.head_size}, expected at most 256", found.first.node)
