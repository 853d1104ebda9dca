"""A model of one node of our domain, for tests and benchmarks of what executes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ..op import DOMAIN, Argument, CustomOp, Form, evaluate
from .onnx_forms import add_functions, attribute_values, register
from .onnx_translation import settle

Array = np.ndarray[Any, Any]


def node_of(op: CustomOp, inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> tuple[Form, dict[str, Any], dict[str, Array]]:
    """The form of a call, all attributes as its node carries them, and its operands: zeros where an input is not given.

    Raises:
        UsageError: The inputs do not fit each other.
    """
    attributes = op.resolve(attributes)
    sizes = op.infer({name: x.shape for name, x in inputs.items()}, attributes)
    form = op.form(frozenset(inputs), attributes)
    dtype = inputs[op.inputs[0].name].dtype
    named = {a.name: a for a in op.inputs}

    def zeros(a: Argument) -> Array:
        return np.zeros([evaluate(dim, sizes) for dim in a.shape], np.float32 if a.wide else dtype)

    operands = {name: inputs[name] if name in inputs else zeros(named[name]) for name in form.inputs}
    return form, settle(op, attributes, sizes), operands


def one_node(
    op: CustomOp,
    form: Form,
    attributes: Mapping[str, Any],
    dtype: ir.DataType,
    *,
    static: Mapping[str, int] | None = None,
    opset: int = 20,
    contrib: bool = False,
) -> ir.Model:
    """A model of one node and its body; inputs and outputs are called as the operator's.

    Args:
        op: The operator.
        form: The node type.
        attributes: All attributes, as `node_of` returns them.
        dtype: Of the activations.
        static: The sizes that are known, by their names in the schema; the others are dynamic.
        opset: The model's opset.
        contrib: See `onnx_forms.add_functions`.
    """
    register()
    known = dict(op.sizes(attributes)) | dict(static or {})

    def size(dim: str | int) -> int | ir.SymbolicDim:
        try:
            return int(evaluate(dim, known))
        except KeyError:
            return ir.SymbolicDim(dim if isinstance(dim, str) and dim.isidentifier() else None)

    def value(a: Argument) -> ir.Value:
        kind = ir.TensorType(ir.DataType.FLOAT if a.wide else dtype)
        return ir.Value(name=a.name, type=kind, shape=ir.Shape([size(dim) for dim in a.shape]))

    named = {a.name: a for a in op.inputs}
    inputs, outputs = [value(named[name]) for name in form.inputs], [value(a) for a in op.outputs]
    node = ir.node(form.op_type, inputs, attribute_values(op, form, attributes), domain=DOMAIN, outputs=outputs, name=op.name)
    model = ir.Model(ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": opset}, name=op.name), ir_version=10)
    add_functions(model, contrib=contrib)
    return model
