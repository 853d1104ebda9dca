"""From our torch operators to ONNX nodes of our domain, for `torch.onnx.export`.

A call becomes one node of the operator's form. Inputs that were not given and that the form has are zeros; a size of theirs that is dynamic
is read from the activations, so that one file serves every batch. What a node has to carry that the call leaves open, because it follows
from the shapes, the operator's `onnx_function.py` settles in a function `settle(attributes, sizes)`, where it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..errors import IsthmusError
from ..op import DOMAIN, OPS, VERSION, Argument, CustomOp, evaluate
from .onnx_forms import attribute_values, register

if TYPE_CHECKING:
    import torch

Source = tuple[ir.Value, int]
"""A value and the axis on which it has a size."""


def translations(program: torch.export.ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """The `custom_translation_table` for the operators of ours that the program uses; empty when it uses none."""
    import torch

    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return {target: _translation(OPS[str(target._schema.name).split("::")[1]]) for target in targets if target.namespace == DOMAIN}


def settle(op: CustomOp, attributes: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """All attributes of an operator as its node carries them: what stands for "as the shapes say" is replaced by what they say."""
    function: Callable[..., dict[str, Any]] | None = getattr(op.part("onnx"), "settle", None)
    return function(attributes, sizes) if function is not None else dict(attributes)


def _translation(op: CustomOp) -> Callable[..., Any]:
    def translate(*tensors: Any, **keywords: Any) -> Any:
        import onnxscript

        given = dict(zip((a.name for a in op.inputs), tensors, strict=False)) | keywords
        attributes = op.resolve({a.name: given.pop(a.name) for a in op.attributes if a.name in given})
        inputs = {name: value for name, value in given.items() if value is not None}
        form = op.form(frozenset(inputs), attributes)
        sizes = _sizes(op, inputs, attributes)
        named = {a.name: a for a in op.inputs}
        first = inputs[op.inputs[0].name]
        operands = [inputs[n] if n in inputs else _zeros(op, named[n], sizes, first) for n in form.inputs]
        call = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), form.op_type, register()[form.op_type])
        return call(*operands, **attribute_values(op, form, settle(op, attributes, sizes)))

    translate.__name__ = op.name
    return translate


def _sizes(op: CustomOp, inputs: Mapping[str, ir.Value], attributes: Mapping[str, Any]) -> dict[str, int | Source]:
    """Every named size of the inputs: its value, or where it is read at run time. That the inputs fit was checked by the trace."""
    sizes: dict[str, Any] = dict(op.sizes(attributes))
    axes = [(str(dim), value, i) for a in op.inputs if (value := inputs.get(a.name)) is not None for i, dim in enumerate(a.shape)]
    for dim, value, i in sorted(axes, key=lambda entry: "*" in entry[0]):
        size = value.shape[i] if value.shape is not None else None
        unknown = [factor for factor in dim.split("*") if factor not in sizes]
        if len(unknown) != 1 or not unknown[0].isidentifier():
            continue
        if not isinstance(size, int):
            if "*" not in dim:
                sizes[dim] = (value, i)
            continue
        known = [sizes[factor] for factor in dim.split("*") if factor in sizes]
        if all(isinstance(k, int) for k in known):
            sizes[unknown[0]] = size // int(np.prod(known, dtype=np.int64))
    return sizes


def _zeros(op: CustomOp, argument: Argument, sizes: Mapping[str, int | Source], like: ir.Value) -> Any:
    """Zeros of an argument's shape, in its dtype beside activations of the dtype of `like`."""
    import onnxscript

    ops: Any = onnxscript.opset18  # the recorder writes the model's opset
    dtype = ir.DataType.FLOAT if argument.wide or like.dtype is None else like.dtype
    parts: list[Any] = []
    known: list[int | ir.SymbolicDim] = []
    for dim in argument.shape:
        size = sizes.get(str(dim))
        if isinstance(size, tuple):
            value, axis = size
            parts.append(ops.Shape(value, start=axis, end=axis + 1))
            assert value.shape is not None
            known.append(value.shape[axis])
            continue
        try:
            fixed = int(evaluate(dim, sizes))
        except (KeyError, TypeError):
            raise IsthmusError(
                f"{op.name}: the size {dim} of {argument.name} is dynamic, and no input has it on an axis of its own",
                hint=f"give {argument.name} as an input, or make that size static",
            ) from None
        known.append(fixed)
        parts.append(ops.Constant(value_ints=[fixed]))
    shape = ops.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]
    zeros = ops.ConstantOfShape(shape, value=ir.tensor(np.zeros(1, dtype.numpy()), dtype=dtype))
    zeros.type, zeros.shape = ir.TensorType(dtype), ir.Shape(known)
    return zeros
