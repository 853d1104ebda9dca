"""What the passes that quantise share: constants with names of their own, and a chain of nodes in the place of one."""

from __future__ import annotations

from collections.abc import Container, Sequence

import onnx_ir as ir


def unused(name: str, *taken: Container[str]) -> str:
    """The name or, where that is taken, the name with a number."""
    count, unique = 1, name
    while any(unique in names for names in taken):
        count += 1
        unique = f"{name}.{count}"
    return unique


def constant_of(graph: ir.Graph, name: str, tensor: ir.TensorProtocol, *, taken: Container[str] = ()) -> ir.Value:
    """A new initializer, under the name or, where an initializer has that or it is among those taken, the name with a number."""
    unique = unused(name, graph.initializers, taken)
    tensor.name = unique
    value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
    graph.register_initializer(value)
    return value


def put_in_place(graph: ir.Graph, old: ir.Node, nodes: Sequence[ir.Node], *, between: Sequence[int | str | None]) -> None:
    """Puts a chain of nodes, the first of which takes over the name, in the place of a node.

    Args:
        graph: Where the node stands.
        old: The node, with one output.
        nodes: Each reads the one before it.
        between: The shape of all outputs but the last, which has that of the node.
    """
    value, last = old.outputs[0], nodes[-1].outputs[0]
    for count, node in enumerate(nodes):
        node.name = old.name if not count else f"{old.name}/{node.op_type}.{count}"
        made = node.outputs[0]
        made.type = value.type
        made.shape = value.shape if made is last else ir.Shape(between)
        made.name = f"{node.name}.output"
        graph.insert_before(old, node)
    name = value.name
    if value.is_graph_output():
        last.metadata_props.update(value.metadata_props)
    value.replace_all_uses_with(last, replace_graph_outputs=True)
    value.name = None
    last.name = name
    graph.remove(old, safe=True)


def drop_unread(graph: ir.Graph, weight: ir.Value) -> None:
    """Takes an initializer out that nothing reads any more."""
    if not weight.uses() and weight.is_initializer() and weight.name is not None:
        del graph.initializers[weight.name]
