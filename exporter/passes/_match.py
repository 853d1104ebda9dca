"""Pieces of the patterns that the fusions look for. Each returns what it found, or None."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ._rewrite import Scope, attribute_int, dims, input_at, ints, new_constant, producer, scalar
from .scope import OPERATOR

_ULP = 2.0**-23  # of float32: a constant computed as 1/sqrt(2) or as sqrt(0.5) may differ by as much


def operands(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both orders of a commutative node's two inputs."""
    a, b = node.inputs[0], node.inputs[1]
    if a is not None and b is not None:
        yield a, b
        yield b, a


def is_scalar(value: ir.Value | None, expected: float) -> bool:
    """Whether the value is a constant of one element, equal to `expected` as float32 up to one unit in the last place."""
    found = scalar(value)
    return found is not None and abs(found - expected) <= _ULP * abs(expected)


def is_float32(*values: ir.Value | None) -> bool:
    """Whether all values are float32: below that the opset's operators compute in another precision than the nodes that they replace."""
    return all(value is not None and value.dtype == ir.DataType.FLOAT for value in values)


def square(value: ir.Value | None) -> ir.Value | None:
    """The x of `x ** 2` or `x * x`."""
    node = producer(value, "Pow")
    if node is not None and scalar(node.inputs[1]) == 2.0:
        return node.inputs[0]
    node = producer(value, "Mul")
    return node.inputs[0] if node is not None and node.inputs[0] is node.inputs[1] else None


def mean(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(x, first axis) of a mean over the last axes that keeps them as 1."""
    node = producer(value, "ReduceMean")
    if node is None or attribute_int(node, "keepdims", 1) != 1:
        return None
    source, axes = node.inputs[0], ints(input_at(node, 1))
    shape = dims(source)
    if source is None or shape is None or not axes:
        return None
    found = sorted(axis % len(shape) for axis in axes)
    return (source, found[0]) if found == list(range(found[0], len(shape))) else None


def normalised(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """(x, a) of `x / sqrt(a)`, `x * (1 / sqrt(a))` or `x * a ** -0.5`."""
    if node.op_type == "Div":
        root = producer(node.inputs[1], "Sqrt")
        x, a = node.inputs[0], root.inputs[0] if root is not None else None
        return (x, a) if x is not None and a is not None else None
    if node.op_type != "Mul":
        return None
    for x, factor in operands(node):
        inverse = producer(factor, "Reciprocal", "Div", "Pow")
        if inverse is None:
            continue
        if inverse.op_type == "Pow":
            a = inverse.inputs[0] if scalar(inverse.inputs[1]) == -0.5 else None
        else:
            if inverse.op_type == "Div" and scalar(inverse.inputs[0]) != 1.0:
                continue
            root = producer(inverse.inputs[-1], "Sqrt")
            a = root.inputs[0] if root is not None else None
        if a is not None:
            return x, a
    return None


def plus_constant(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """(x, c) of `x + c`, c a constant of one element."""
    node = producer(value, "Add")
    if node is not None:
        for x, c in operands(node):
            number = scalar(c)
            if number is not None:
                return x, number
    return None


def only_user(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The one node that uses the value, when it is one of these operators and the value is no graph output."""
    users = value.uses()
    if value.is_graph_output() or len(users) != 1:
        return None
    (use,) = users
    return use.node if use.node.domain == "" and use.node.op_type in op_types and use.node.graph is value.graph else None


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of a two-input node that is not `value`."""
    rest = [v for v in node.inputs if v is not value]
    return rest[0] if len(rest) == 1 else None


def has_dims(value: ir.Value | None, expected: list[int]) -> bool:
    """Whether the value's shape is static and equal to this."""
    return value is not None and dims(value) == expected


def static_tail(value: ir.Value, axis: int) -> list[int] | None:
    """The sizes from an axis on, when all are static."""
    shape = dims(value)
    tail = [d for d in shape[axis:] if isinstance(d, int)] if shape is not None else []
    return tail if shape is not None and tail and len(tail) == len(shape) - axis else None


def ones(scope: Scope, node: ir.Node, sizes: list[int], dtype: ir.DataType) -> ir.Value:
    """A scale that changes nothing."""
    return new_constant(scope, node, np.ones(sizes, dtype=dtype.numpy()))


def call_it(node: ir.Node, operator: str) -> ir.Node:
    """Sets the operator name by which the node is to be called."""
    if OPERATOR in node.metadata_props:
        node.metadata_props[OPERATOR] = operator
    return node
