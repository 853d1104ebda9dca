"""What the passes share: walking every graph of a model, reading constants, and replacing values without losing names or origin."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..op import DOMAIN

ORIGIN = "isthmus.origin"  # node.meta: the scope.Origin that the node was made for; also on the values of constants that passes made
TRANSPOSE_OF = "isthmus.transpose_of"  # value.meta: the tensor whose axes an initializer has in reverse, for who can read it as it is
MADE_BY_PASS = "isthmus.made_by_pass"  # noqa: S105 - value.meta: a constant that a pass made, so that it may be merged and renamed

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Scope:
    """One graph and where it stands.

    Attributes:
        graph: The main graph, the body of an If, Loop or Scan, or the graph of a function.
        root: The graph at the top: the main graph or the function's.
        opset: The version of the default operator set in force.
        is_function: True inside a model function, which has no initializers.
    """

    graph: ir.Graph
    root: ir.Graph
    opset: int
    is_function: bool


def scopes(model: ir.Model) -> Iterator[Scope]:
    """Every graph of the model, outer before inner, the functions' last.

    The bodies of our own operators are not among them: they are written as they are to be, and replaced as a whole.
    """
    default = model.opset_imports.get("", 0)
    for graph in (model.graph, *model.graph.subgraphs()):
        yield Scope(graph, model.graph, default, is_function=False)
    for function in model.functions.values():
        if function.domain == DOMAIN:
            continue
        opset = function.opset_imports.get("", default)
        for graph in (function.graph, *function.graph.subgraphs()):
            yield Scope(graph, function.graph, opset, is_function=True)


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether the node is one of these operators of the default domain."""
    return node is not None and node.domain == "" and node.op_type in op_types


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes the value, when it is one of these operators of the default domain."""
    node = value.producer() if value is not None else None
    return node if is_op(node, *op_types) else None


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, and what the nodes in its bodies read."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                yield from (value for value in inner.inputs if value is not None)


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """The input at a position, or None when it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a constant value, not read. None for all else, an initializer that is also a graph input among them."""
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if node is None:
        return value.const_value if value.is_initializer() else None
    if not is_op(node, "Constant") or len(node.attributes) != 1 or any(attribute.is_ref() for attribute in node.attributes.values()):
        return None
    return ir.convenience.get_const_tensor(value)


def constant(value: ir.Value | None, limit: int = 1 << 16) -> Array | None:
    """The contents of a constant value of at most `limit` bytes, so that no weight is read by chance; None for all else."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes > limit:
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The one element of a constant of size 1, as a Python float (exact: every float16, bfloat16 and float32 is a float64)."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 and array.dtype != np.bool_ else None


def ints(value: ir.Value | None) -> list[int] | None:
    """The elements of a constant int64 or int32 vector or scalar."""
    array = constant(value)
    if array is None or array.ndim > 1 or array.dtype not in (np.int64, np.int32):
        return None
    return [int(i) for i in array.reshape(-1)]


def attribute_int(node: ir.Node, name: str, default: int) -> int | None:
    """An integer attribute; None when it refers to an attribute of the enclosing function."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return None if attribute.is_ref() else attribute.as_int()


def attribute_ints(node: ir.Node, name: str) -> list[int] | None:
    """An attribute that is a list of integers; None when it is absent or a reference."""
    attribute = node.attributes.get(name)
    return None if attribute is None or attribute.is_ref() else list(attribute.as_ints())


def dims(value: ir.Value | None) -> list[int | str | None] | None:
    """The shape: an int for a static size, a name for a symbolic one, None for an unknown one. None when the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether both shapes are wholly known, by size or by name, and equal."""
    left, right = dims(a), dims(b)
    return left is not None and left == right and None not in left


def new_node(
    like: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None, outputs: int = 1
) -> ir.Node:
    """A node of the default domain that inherits the metadata of the node it stands for."""
    node = ir.node(op_type, inputs, attributes or {}, num_outputs=outputs)
    node.metadata_props.update(like.metadata_props)
    node.meta.update(like.meta)
    return node


def new_constant(scope: Scope, like: ir.Node, array: Array | ir.TensorProtocol) -> ir.Value:
    """A constant for use at the node `like`: an initializer of the main graph, or a Constant node inside a function."""
    tensor = array if isinstance(array, ir.TensorProtocol) and not isinstance(array, np.ndarray) else ir.tensor(array)
    if scope.is_function:
        node = new_node(like, "Constant", [], {"value": tensor})
        scope.graph.insert_before(like, node)
        value = node.outputs[0]
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        return value
    count = len(scope.root.initializers)
    while (name := f"isthmus.constant.{count}") in scope.root.initializers:
        count += 1
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)
    tensor.name = name
    value.meta[MADE_BY_PASS] = True
    if ORIGIN in like.meta:
        value.meta[ORIGIN] = like.meta[ORIGIN]
    scope.root.register_initializer(value)
    return value


def replaceable(old: ir.Value, new: ir.Value) -> bool:
    """Whether `old` can become `new` everywhere. A graph output needs a value of its own, made by a node of that graph."""
    if not old.is_graph_output():
        return True
    return new.producer() is not None and new.graph is old.graph and not new.is_graph_output() and not new.is_graph_input()


def replace(old: ir.Value, new: ir.Value) -> bool:
    """Makes every use of `old` a use of `new`, which takes over the name of a graph output and what is known of its shape.

    Returns:
        False, with nothing changed, when `replaceable` says no.
    """
    if not replaceable(old, new):
        return False
    if new.type is None:
        new.type = old.type
    if old.shape is not None and not new.is_initializer():
        merge_shape(new, old.shape)
    name = old.name if old.is_graph_output() else None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if name is not None:
        old.name = None
        new.name = name
        new.metadata_props.update(old.metadata_props)
    return True


def replace_node(node: ir.Node, replacement: ir.Node) -> None:
    """Puts `replacement`, with as many outputs, in the place of `node`, and removes `node`."""
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, replacement)
    for old, new in zip(node.outputs, replacement.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        name = old.name
        graph_output = old.is_graph_output()
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
        if graph_output:
            new.metadata_props.update(old.metadata_props)
        new.name = name
    graph.remove(node, safe=True)


def merge_shape(value: ir.Value, shape: ir.Shape | None) -> bool:
    """Adds to the value's shape what `shape` knows more. A contradiction leaves it as it is.

    Returns:
        True when the value's shape changed.
    """
    if shape is None or (value.shape is not None and value.shape == shape):
        return False
    before = value.shape.copy() if value.shape is not None else None
    try:
        value.merge_shapes(shape)
    except ValueError:
        return False
    return value.shape != before


def size(shape: Sequence[int]) -> int:
    """The number of elements."""
    return math.prod(int(d) for d in shape)
