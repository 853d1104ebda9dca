"""The values that the layers of a graph read and compute: what a calibration observes for those that store both in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ._rewrite import attribute_int, constant_tensor, dims, is_op, size
from .scope import module_of

ACTIVATIONS = ("Relu", "LeakyRelu", "Tanh", "Sigmoid", "Clip")
"""Functions that compilers compute together with the layer before them, whose result is then what is stored."""


@dataclass(frozen=True)
class LayerValues:
    """A product of an activation and a weight.

    Attributes:
        node: The name of the MatMul, Gemm or Conv.
        module: Its PyTorch module.
        weight: The weight's name.
        axis: The axis of the weight that counts the output channels.
        operand: The name of the activation that it reads.
        product: The name of what it computes, with its bias.
        result: The same behind one of `ACTIVATIONS`, where nothing else reads the product.
        activation: That function's operator; empty where there is none, and the result is the product.
    """

    node: str
    module: str
    weight: str
    axis: int
    operand: str
    product: str
    result: str
    activation: str = ""


def layer_values(model: ir.Model) -> tuple[LayerValues, ...]:
    """Every product of an activation and a weight in the main graph of a float32 model, in order."""
    return tuple(_found(model))


def _found(model: ir.Model) -> Iterator[LayerValues]:
    for node in model.graph:
        if not is_op(node, "MatMul", "Gemm", "Conv"):
            continue
        operand, weight = node.inputs[0], node.inputs[1]
        if operand is None or weight is None or operand.dtype != ir.DataType.FLOAT:
            continue
        if constant_tensor(weight) is None or constant_tensor(operand) is not None:
            continue
        axis = 0 if is_op(node, "Conv") or (is_op(node, "Gemm") and attribute_int(node, "transB", 0)) else -1
        shape = dims(weight) or [0]
        axis %= len(shape)
        product, result, activation = _computed(node, shape[axis])
        names = (operand.name or "", product.name or "", result.name or "")
        yield LayerValues(node.name or "", module_of(node), weight.name or "", axis, *names, activation)


def _computed(node: ir.Node, outputs: int | str | None) -> tuple[ir.Value, ir.Value, str]:
    """The product, the result, and the function between them."""
    value = node.outputs[0]
    reader = _only_reader(value)
    if reader is not None and is_op(node, "MatMul") and is_op(reader, "Add"):
        other = next(v for v in reader.inputs if v is not value)
        tensor = constant_tensor(other)
        if tensor is not None and size(tensor.shape.numpy()) == outputs:
            value = reader.outputs[0]
            reader = _only_reader(value)
    if reader is not None and is_op(reader, *ACTIVATIONS) and reader.inputs[0] is value:
        return value, reader.outputs[0], reader.op_type
    return value, value, ""


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, once; None where there are others, or the value is an output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
