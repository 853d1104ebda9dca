"""Where FP8 is in a graph: what a matrix product reads, seen through the nodes that only move values, and the products of attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from ...exporter.passes._rewrite import attribute_int, attribute_ints, constant_tensor, dims, input_at, is_op, producer, scalar

E4M3 = ir.DataType.FLOAT8E4M3FN

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
"""The operators that TensorRT compiles to FP8 matrix products. Attention is not among them: its products are written out in FP8."""

MOVES = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Expand"})
"""Nodes that move values and compute none, through which TensorRT carries FP8."""

Granularity = Literal["tensor", "channel", "block"]


@dataclass(frozen=True)
class Operand:
    """What a node reads.

    Attributes:
        value: The input.
        dequantize: The DequantizeLinear of E4M3 that it comes from; None when it comes from none.
        quantize: The QuantizeLinear before that; None for what is stored in FP8.
        moves: The nodes between, the one next to the reader first.
        weight: It is a constant, quantised or not.
    """

    value: ir.Value
    dequantize: ir.Node | None
    quantize: ir.Node | None
    moves: tuple[ir.Node, ...]
    weight: bool

    @property
    def fp8(self) -> bool:
        """Whether it is FP8."""
        return self.dequantize is not None

    @property
    def granularity(self) -> Granularity | None:
        """What one scale is for; None in half precision, and when the scale's shape is not known."""
        return granularity(self.dequantize) if self.dequantize is not None else None

    @property
    def axis(self) -> int | None:
        """The axis of `value` along which a scale a channel varies; None when there is none, or a reshape hides it."""
        if self.dequantize is None or self.granularity != "channel":
            return None
        shape = shape_of(self.dequantize.inputs[0])
        axis = attribute_int(self.dequantize, "axis", 1)
        if shape is None or axis is None:
            return None
        axis %= len(shape)
        for move in reversed(self.moves):
            if move.op_type == "Transpose":
                order = attribute_ints(move, "perm") or list(range(len(shape)))[::-1]
                axis = order.index(axis)
            elif move.op_type != "Identity":
                return None
        return axis


def operand(value: ir.Value, through: frozenset[str] = MOVES) -> Operand:
    """Follows a value back through moves to where it is dequantised."""
    moves: list[ir.Node] = []
    source = value
    while (node := source.producer()) is not None and is_op(node, *through) and node.inputs and (first := node.inputs[0]) is not None:
        moves.append(node)
        source = first
    dequantize = producer(source, "DequantizeLinear")
    stored = dequantize.inputs[0] if dequantize is not None else None
    if dequantize is None or stored is None or element_type(stored) != E4M3:
        return Operand(value, None, None, (), constant_tensor(source) is not None)
    quantize = producer(stored, "QuantizeLinear")
    root = quantize.inputs[0] if quantize is not None else stored
    return Operand(value, dequantize, quantize, tuple(moves), constant_tensor(root) is not None)


def element_type(value: ir.Value) -> ir.DataType | None:
    """A value's type, also where no inference has noted it: a constant's own, or what a QuantizeLinear is told to make."""
    if value.dtype is not None:
        return value.dtype
    if (tensor := constant_tensor(value)) is not None:
        return tensor.dtype
    node = producer(value, "QuantizeLinear")
    if node is None:
        return None
    if code := attribute_int(node, "output_dtype", 0):
        return type_of_code(code)
    zero = input_at(node, 2)
    return zero.dtype if zero is not None else ir.DataType.UINT8


def type_of_code(code: int | None) -> ir.DataType | None:
    """The type that an attribute names; None for none, and for a number that is no type."""
    return ir.DataType(code) if code and code in ir.DataType.__members__.values() else None


def shape_of(value: ir.Value | None) -> list[int | str | None] | None:
    """A value's shape, also where no inference has noted it: a constant's own."""
    shape = dims(value)
    if shape is None and (tensor := constant_tensor(value)) is not None:
        return list(tensor.shape.numpy())
    return shape


def granularity(node: ir.Node) -> Granularity | None:
    """What one scale of a QuantizeLinear or DequantizeLinear is for; None when the scale's shape is not known."""
    shape = shape_of(input_at(node, 1))
    if attribute_int(node, "block_size", 0) or (shape is not None and len(shape) > 1):
        return "block"
    if shape is None:
        return None
    return "channel" if shape and shape[0] != 1 else "tensor"


@dataclass(frozen=True)
class Product:
    """A matrix product.

    Attributes:
        node: The node.
        a: Its first operand: the activations of a layer.
        b: Its second: a layer's weight.
        inner: The axis of each over which the product sums; None when the rank is not known.
    """

    node: ir.Node
    a: Operand
    b: Operand
    inner: tuple[int | None, int | None]


def product(node: ir.Node) -> Product | None:
    """The node as a matrix product; None when it is none."""
    if not is_op(node, *PRODUCTS):
        return None
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None:
        return None
    return Product(node, operand(a), operand(b), _inner(node, shape_of(a), shape_of(b)))


def _inner(node: ir.Node, a: list[int | str | None] | None, b: list[int | str | None] | None) -> tuple[int | None, int | None]:
    if node.op_type == "MatMul":
        return (len(a) - 1 if a else None, max(len(b) - 2, 0) if b else None)
    if node.op_type == "Gemm":
        return (0 if attribute_int(node, "transA", 0) else 1, 1 if attribute_int(node, "transB", 0) else 0)
    return (1, 0 if node.op_type == "ConvTranspose" else 1)


@dataclass(frozen=True)
class WrittenAttention:
    """Attention that is written as two products and a softmax.

    Attributes:
        first: The product of queries and keys.
        softmax: The Softmax.
        second: The product with the values.
        between: The nodes from the first product to the softmax, in order.
    """

    first: Product
    softmax: ir.Node
    second: Product
    between: tuple[ir.Node, ...]

    @property
    def operands(self) -> dict[str, Operand]:
        """What is multiplied, by its role."""
        return {"Q": self.first.a, "K": self.first.b, "V": self.second.b, "the softmax's output": self.second.a}

    @property
    def fp8(self) -> bool:
        """Whether any operand is FP8."""
        return any(o.fp8 for o in self.operands.values())

    @property
    def head_size(self) -> int | None:
        """The size of a head, where it is known."""
        shape = shape_of(self.first.a.value)
        return shape[-1] if shape and isinstance(shape[-1], int) else None

    @property
    def scales_after(self) -> bool:
        """Whether a constant is multiplied in between the first product and the softmax."""
        return any(is_op(n, "Mul", "Div") and any(scalar(v) is not None for v in n.inputs) for n in self.between)


_BETWEEN = ("Mul", "Div", "Add", "Sub", "Where", "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Expand")


def written_attention(softmax: ir.Node) -> WrittenAttention | None:
    """The attention around a Softmax; None when it is something else."""
    if not is_op(softmax, "Softmax"):
        return None
    first, second = _product_before(softmax.inputs[0]), _product_after(softmax)
    if first is None or second is None:
        return None
    return WrittenAttention(first[0], softmax, second, first[1])


def _product_before(value: ir.Value | None, depth: int = 6) -> tuple[Product, tuple[ir.Node, ...]] | None:
    """The product that makes the scores, and the nodes from it to `value`: a scale, a mask, casts."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if is_op(node, "MatMul"):
        found = product(node)
        return (found, ()) if found is not None else None
    if depth == 0 or not is_op(node, *_BETWEEN):
        return None
    for source in node.inputs:
        if constant_tensor(source) is None and (before := _product_before(source, depth - 1)) is not None:
            return before[0], (*before[1], node)
    return None


def _product_after(softmax: ir.Node) -> Product | None:
    """Follows the softmax's output to the product that it is the first operand of, past moves and Q/DQ."""
    passing = {*MOVES, "QuantizeLinear", "DequantizeLinear", "Cast"}
    value, steps = softmax.outputs[0], 0
    while steps < 16:
        users = [use.node for use in value.uses()]
        if len(users) != 1:
            return None
        (user,) = users
        if is_op(user, "MatMul"):
            return product(user) if user.inputs[0] is value else None
        if not is_op(user, *passing) or user.inputs[0] is not value:
            return None
        value, steps = user.outputs[0], steps + 1
    return None


def written_attentions(nodes: Iterator[ir.Node]) -> Iterator[WrittenAttention]:
    """Every attention that is written out among some nodes."""
    for node in nodes:
        if (found := written_attention(node)) is not None:
            yield found
