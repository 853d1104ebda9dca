"""The ONNX node types of our domain: their schemas, and the functions that give a node its body in the file.

A node `isthmus.NAME` of a `Form` stands in the graph; a function of the same name stands in the model beside it, so that an unmodified ONNX
Runtime inlines the body, and one with a kernel for the node keeps it. The bodies are written in ONNX's text format in the operators'
`onnx_function.py`, in `BODIES`, a text for each form between the braces of a function; the form is what is before them. They use standard
operators that mean the same in every opset from 20 on, take activations in float32, float16 or bfloat16, and have as many nodes for every
length. `CONTRIB` holds bodies of `com.microsoft` operators, for files that only ONNX Runtime reads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir
from onnx.defs import OpSchema

from ..op import DOMAIN, OPS, VERSION, Argument, CustomOp, Form

_ACTIVATIONS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_ATTRIBUTE_TYPES = {
    bool: OpSchema.AttrType.INT,
    int: OpSchema.AttrType.INT,
    float: OpSchema.AttrType.FLOAT,
    str: OpSchema.AttrType.STRING,
}
CONTRIB_DOMAIN = "com.microsoft"

Key = tuple[str, str, str]
"""What a model's functions are kept by: domain, name, overload."""


def forms() -> dict[str, tuple[CustomOp, Form]]:
    """Every node type of the domain, with its operator and form."""
    return {form.op_type: (OPS[name], form) for name in OPS for form in OPS[name].forms}


def node_attributes(op: CustomOp, form: Form) -> tuple[str, ...]:
    """The attributes that a node of the form carries."""
    return tuple(a.name for a in op.attributes if a.name not in form.fixed)


def schema(op: CustomOp, form: Form) -> OpSchema:
    """The form's ONNX schema: activations of type T, wide arguments float32, no optional inputs."""
    named = {a.name: a for a in op.inputs}

    def formal(a: Argument) -> OpSchema.FormalParameter:
        return OpSchema.FormalParameter(a.name, "tensor(float)" if a.wide else "T", f"({', '.join(map(str, a.shape))})")

    carried = node_attributes(op, form)
    return OpSchema(
        form.op_type,
        DOMAIN,
        VERSION,
        op.summary,
        inputs=[formal(named[name]) for name in form.inputs],
        outputs=[formal(a) for a in op.outputs],
        type_constraints=[("T", _ACTIVATIONS, "activations")],
        attributes=[OpSchema.Attribute(a.name, _ATTRIBUTE_TYPES[a.type], required=True) for a in op.attributes if a.name in carried],
    )


@functools.cache
def register() -> Mapping[str, OpSchema]:
    """Registers the schemas of all forms with onnx, once in a process, and returns them by node type."""
    schemas = {name: schema(op, form) for name, (op, form) in forms().items()}
    for each in schemas.values():
        onnx.defs.register_schema(each)
    return schemas


@functools.lru_cache(maxsize=64)
def _function_text(op_type: str, opset: int, contrib: bool) -> str:
    op, form = forms()[op_type]
    part = op.part("onnx")
    bodies: Mapping[str, str] = {**part.BODIES, **(getattr(part, "CONTRIB", {}) if contrib else {})}
    imports = f'"" : {opset}' + (f', "{CONTRIB_DOMAIN}" : 1' if f"{CONTRIB_DOMAIN}." in bodies[op_type] else "")
    attributes = ", ".join(node_attributes(op, form))
    head = f'<domain: "{DOMAIN}", opset_import: [{imports}]>\n{op_type} {f"<{attributes}> " if attributes else ""}'
    return f"{head}({', '.join(form.inputs)}) => ({', '.join(a.name for a in op.outputs)}) {{{bodies[op_type]}}}"


def function(op_type: str, opset: int, *, contrib: bool = False) -> ir.Function:
    """The function that is the body of a node type.

    Args:
        op_type: The node type.
        opset: The opset of the model that it is for, 20 or later.
        contrib: Take the body of `com.microsoft` operators where there is one.
    """
    return ir.serde.deserialize_function(onnx.parser.parse_function(_function_text(op_type, opset, contrib)))


def custom_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of our domain, in subgraphs too."""
    return [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == DOMAIN]


def add_functions(model: ir.Model, *, contrib: bool = False) -> None:
    """Puts a function into the model for every node type of our domain that it uses, in the place of one that is there; others go.

    Args:
        model: The model; changed in place.
        contrib: See `function`.
    """
    used = {node.op_type for node in custom_nodes(model)}
    for key in [key for key in model.functions if key[0] == DOMAIN and key[1] not in used]:
        del model.functions[key]
    for op_type in sorted(used):
        made = function(op_type, model.opset_imports[""], contrib=contrib)
        model.functions[made.identifier()] = made
        for domain, version in made.opset_imports.items():
            model.opset_imports.setdefault(domain, version)
    if used:
        model.opset_imports[DOMAIN] = VERSION
    else:
        model.opset_imports.pop(DOMAIN, None)


def attribute_values(op: CustomOp, form: Form, attributes: Mapping[str, Any]) -> dict[str, int | float | str]:
    """The attributes of a node of the form: those that it carries, bools as numbers."""
    return {name: int(value) if isinstance(value := attributes[name], bool) else value for name in node_attributes(op, form)}


def values_of(node: ir.Node) -> dict[str, Any]:
    """All attributes of the operator that a node of our domain stands for, those that its form fixes among them."""
    op, form = forms()[node.op_type]
    types = {a.name: a.type for a in op.attributes}
    return {**form.fixed, **{name: types[name](node.attributes[name].value) for name in node_attributes(op, form)}}


def inputs_of(node: ir.Node) -> dict[str, ir.Value]:
    """The inputs of a node of our domain by name."""
    _, form = forms()[node.op_type]
    return {name: value for name, value in zip(form.inputs, node.inputs, strict=True) if value is not None}
