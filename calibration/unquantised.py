"""A quantised graph without its quantisation: what it computed before QuantizeLinear and DequantizeLinear were put into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch

from ..exporter.passes import module_of
from ..exporter.passes._rewrite import Array, constant_tensor, producer

_SIMILAR = 0.8
"""The cosine from which on a quantised weight is taken for a parameter. Those of four bits have 0.98, those of unrelated weights some 0.1;
a wrong scale changes no cosine."""


class RemoveQuantisation(ir.passes.InPlacePass):
    """Takes QuantizeLinear and DequantizeLinear out of the main graph.

    Given::

        q = QuantizeLinear(x, x_scale)
        d = DequantizeLinear(q, x_scale)
        v = DequantizeLinear<axis=1>(w_fp8, w_scale)
        y = MatMul(d, v)          # in module `attn.qkv`

    Result, w being the parameter of `attn.qkv` that v is nearest to, as it is or with its axes in reverse::

        y = MatMul(x, w)

    A weight that is near to no parameter of its module stays quantised.

    Args:
        parameters: The PyTorch module's parameters by name; not copied.

    Attributes:
        kept: The names of the weights that stayed quantised.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters
        self.kept: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for node in [n for n in model.graph if n.op_type == "DequantizeLinear" and n.domain == ""]:
            stored, value = node.inputs[0], node.outputs[0]
            quantize = producer(stored, "QuantizeLinear")
            source = quantize.inputs[0] if quantize is not None else None
            if source is None and constant_tensor(stored) is not None:
                source = self._original(model, node)
            if source is None or value.is_graph_output():
                continue
            value.replace_all_uses_with(source)
            modified = True
        ir.passes.common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)

    def _original(self, model: ir.Model, node: ir.Node) -> ir.Value | None:
        """The parameter that a quantised weight was made of, as an initializer in the weight's type."""
        value = node.outputs[0]
        weight = dequantised(node)
        found = max(self._candidates(module_of(node), weight), key=lambda pair: pair[0], default=None)
        if found is None or found[0] < _SIMILAR:
            self.kept.append(str(value.name))
            return None
        array = found[1]
        dtype = value.dtype or ir.DataType.FLOAT

        # Lazily, and not cached: a second copy of all weights is never held.
        def convert() -> ir.TensorProtocol:
            return ir.tensor(array.astype(dtype.numpy()), name=name)

        name = f"{value.name}.original"
        tensor = ir.LazyTensor(convert, dtype=dtype, shape=ir.Shape(array.shape), name=name, cache=False)
        original = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
        model.graph.register_initializer(original)
        return original

    def _candidates(self, module: str, weight: Array) -> Iterator[tuple[float, Array]]:
        """The parameters of a module that have the weight's shape, and their cosines to it."""
        norm = float(np.linalg.norm(weight))
        for name, parameter in self._parameters.items():
            if name.rpartition(".")[0] != module:
                continue
            array = parameter.detach().cpu().numpy()
            for form in (array, array.T) if array.ndim > 1 else (array,):
                size = norm * float(np.linalg.norm(form))
                if form.shape == weight.shape and size > 0:
                    yield float((form * weight).sum(dtype=np.float64)) / size, form


def dequantised(node: ir.Node) -> Array:
    """What a DequantizeLinear of a constant computes, per tensor, per axis or in blocks, in float32."""
    stored, scale, zero = (constant_tensor(v) for v in (*node.inputs, None)[:3])
    assert stored is not None
    assert scale is not None
    numbers, scales = stored.numpy().astype(np.float32), scale.numpy().astype(np.float32)
    zeros = zero.numpy().astype(np.float32) if zero is not None else np.zeros_like(scales)
    axis_attribute, block_attribute = node.attributes.get("axis"), node.attributes.get("block_size")
    axis = (axis_attribute.as_int() if axis_attribute is not None else 1) % max(numbers.ndim, 1)
    block = block_attribute.as_int() if block_attribute is not None else 0

    def spread(each: Array) -> Array:
        if block:
            return np.repeat(each, block, axis).take(range(numbers.shape[axis]), axis)
        if each.ndim == 1 and each.size > 1:
            return each.reshape([-1 if i == axis else 1 for i in range(numbers.ndim)])
        return each.reshape([1] * numbers.ndim) if each.size == 1 else each

    result: Array = (numbers - spread(zeros)) * spread(scales)
    return result
