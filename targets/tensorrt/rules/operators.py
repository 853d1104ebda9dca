"""Operators that TensorRT's parser has no layer for."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.subject import Subject

WITHOUT_LAYER = frozenset(
    "AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress ConcatFromSequence "
    "ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix "
    "Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch "
    "SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss "
    "SplitToSequence StringConcat StringNormalizer StringSplit SwiGLU TfIdfVectorizer Unique".split()
)
"""Operators of the default domain for which `OnnxParser.supports_operator` of TensorRT-RTX 1.7.1 says no."""


@register_rule(
    "TRT-401",
    summary="operator that TensorRT does not have",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="write it with other operators, or as an operator of your own with a plugin",
    source="measured with TensorRT-RTX 1.7.1: OnnxParser.supports_operator; "
    "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md",
)
def operator_without_layer(subject: Subject) -> Iterator[Match]:
    """A node of the default domain is one of these."""
    for node in subject.nodes(*WITHOUT_LAYER):
        if node.op_identifier() not in subject.model.functions:
            yield Match(f"TensorRT has no {node.op_type}", node)


@register_rule(
    "TRT-402",
    summary="NonZero",
    effect="refused",
    targets=("tensorrt-rtx",),
    fix="compute with a mask of fixed size",
    source="measured with TensorRT-RTX 1.7.1: its parser looks for a plugin, which nobody ships",
)
def non_zero(subject: Subject) -> Iterator[Match]:
    """A node is NonZero."""
    for node in subject.nodes("NonZero"):
        yield Match("TensorRT-RTX has no NonZero", node)
