"""What a node of our domain stands for, put in its place: a body in ONNX's text format becomes nodes of the graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir

from ..ops.onnx_forms import forms, values_of
from ._rewrite import ORIGIN, dims, replace

Shapes = Mapping[str, list[int | str | None] | None]
"""Shapes of a node's inputs by name: an int for a static size, a name for a symbolic one, None for an unknown one."""


def input_shapes(node: ir.Node) -> Shapes:
    """The shapes of the inputs of a node of our domain."""
    _, form = forms()[node.op_type]
    return {name: dims(value) for name, value in zip(form.inputs, node.inputs, strict=True)}


def splice(node: ir.Node, body: str, opset: int) -> None:
    """Replaces a node of our domain by the nodes of a body, which keep the module and the call that the node was made for.

    Args:
        node: The node; it is removed.
        body: The text between the braces of a function with the form's inputs and the operator's outputs; `@name` stands for an attribute.
        opset: The opset of the model.
    """
    op, form = forms()[node.op_type]
    text = (
        f'<domain: "body", opset_import: ["" : {opset}]> body ({", ".join(form.inputs)}) => ({", ".join(a.name for a in op.outputs)}) '
        f"{{{with_values(body, values_of(node))}}}"
    )
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    graph = node.graph
    assert graph is not None
    for formal, actual in zip(function.inputs, node.inputs, strict=True):
        assert actual is not None
        formal.replace_all_uses_with(actual)
    nodes, results = list(function), list(function.outputs)
    function.outputs.clear()
    prefix = node.outputs[0].name  # of its own in the whole model, and so are the names that begin with it
    for made in nodes:
        function.remove(made)
        for inner in (made, *_inner(made)):
            inner.metadata_props.update(node.metadata_props)
            if ORIGIN in node.meta:
                inner.meta[ORIGIN] = node.meta[ORIGIN]
            for value in inner.outputs:
                value.name = f"{prefix}/{value.name}"
        for inner_graph in _bodies(made):
            for value in inner_graph.inputs:
                value.name = f"{prefix}/{value.name}"
    graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, results, strict=True):
        new.type, new.shape = old.type, old.shape
        replaced = replace(old, new)
        assert replaced, "a body ends in nodes of its own"
    graph.remove(node, safe=True)


def with_values(body: str, attributes: Mapping[str, Any]) -> str:
    """The body with the values of the attributes in the place of the references to them."""

    def literal(match: re.Match[str]) -> str:
        value = attributes[match[1]]
        return f'"{value}"' if isinstance(value, str) else repr(float(value)) if isinstance(value, float) else str(int(value))

    return re.sub(r"@(\w+)", literal, body)


def _bodies(node: ir.Node) -> list[ir.Graph]:
    return [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def _inner(node: ir.Node) -> list[ir.Node]:
    return [inner for body in _bodies(node) for inner in body]
