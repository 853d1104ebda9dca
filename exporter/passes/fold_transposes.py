"""Transposes of weights, folded without a second copy of the weights in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ._rewrite import ORIGIN, TRANSPOSE_OF, attribute_ints, constant_tensor, is_op, replace, scopes


class FoldTransposes(ir.passes.InPlacePass):
    """Replaces the Transpose of an initializer by a transposed initializer whose bytes are computed when they are asked for.

    Given::

        f (float[2, 4] x) => (float[2, 3] y) <float[3, 4] proj.weight> {
            t = Transpose <perm: ints = [1, 0]> (proj.weight)
            y = MatMul (x, t)
        }

    Result::

        f (float[2, 4] x) => (float[2, 3] y) <float[4, 3] proj.weight.T> {
            y = MatMul (x, proj.weight.T)
        }

    The new initializer is called `NAME.T` when the axes are reversed (every matrix) and `NAME.transpose_0_2_1` otherwise. It holds an
    `onnx_ir.LazyTensor`: serialisation, which takes one tensor at a time, holds one transposed tensor at a time. A second Transpose of
    the same weight uses the same initializer. The original stays for as long as something uses it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        made: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
        for scope in scopes(model):
            if scope.is_function:
                continue
            for node in scope.graph:
                if not is_op(node, "Transpose"):
                    continue
                weight, out = node.inputs[0], node.outputs[0]
                tensor = constant_tensor(weight)
                if weight is None or tensor is None or not weight.is_initializer() or out.is_graph_output():
                    continue
                rank = len(tensor.shape)
                perm = tuple(attribute_ints(node, "perm") or range(rank - 1, -1, -1))
                key = (weight, perm)
                if key not in made:
                    made[key] = _register(weight, tensor, perm)
                    if ORIGIN in node.meta:
                        made[key].meta[ORIGIN] = node.meta[ORIGIN]
                replace(out, made[key])
                scope.graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)


def _register(weight: ir.Value, tensor: ir.TensorProtocol, perm: tuple[int, ...]) -> ir.Value:
    graph = weight.graph
    assert graph is not None
    reversed_axes = perm == tuple(range(len(perm) - 1, -1, -1))
    base = f"{weight.name}.T" if reversed_axes else f"{weight.name}.transpose_{'_'.join(map(str, perm))}"
    name, count = base, 0
    while name in graph.initializers:
        count += 1
        name = f"{base}.{count}"
    shape = ir.Shape([tensor.shape.numpy()[axis] for axis in perm])
    lazy = ir.LazyTensor(lambda: _transposed(tensor, perm, name), dtype=tensor.dtype, shape=shape, name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=lazy)
    value.meta.update(weight.meta)
    if reversed_axes:
        value.meta[TRANSPOSE_OF] = tensor
    graph.register_initializer(value)
    return value


def _transposed(tensor: ir.TensorProtocol, perm: tuple[int, ...], name: str) -> ir.TensorProtocol:
    raw: Any = tensor.raw
    if hasattr(raw, "permute"):  # a torch.Tensor: its blocked copy is some five times faster than numpy's strided one
        return ir.tensor_adapters.TorchTensor(raw.detach().permute(perm).contiguous(), name=name)
    return ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(perm)), dtype=tensor.dtype, name=name)
