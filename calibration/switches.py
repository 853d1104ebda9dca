"""A float32 graph in which every module's quantisation can be switched on: one session of ONNX Runtime runs any choice of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..exporter.errors import IsthmusError
from ..exporter.grids import GRIDS, Parameters, RoundedWeight
from ..exporter.passes import quantize_fp8, quantize_int8
from ..exporter.passes._rewrite import constant_tensor, input_at, is_op
from ..exporter.passes.expand_attention_mask import ExpandAttentionMask
from ..exporter.passes.fp8_layers import Layer
from ..exporter.passes.write_attention import write_attention
from ..exporter.ranges import CalibrationTable

Array = np.ndarray[Any, Any]

_E4M3 = ir.DataType.FLOAT8E4M3FN
_HALF = ir.DataType.FLOAT16


def switch(index: int) -> str:
    """The name of the input, a bool without axes, that switches a module on."""
    return f"isthmus.switch.{index}"


def switched(
    model: ir.Model,
    layers: Sequence[tuple[Layer, int]],
    table: CalibrationTable,
    precision: str,
    *,
    weights: Mapping[str, RoundedWeight] | None = None,
    corrections: Mapping[str, Array] | None = None,
) -> ir.Model:
    """A copy of the graph with a switch for each module.

    What is switched on reads numbers that were quantised and read back, on the scales that `QuantizeFp8` and `QuantizeInt8` write; sums are
    float32 ones, and so is all that is not quantised. Weights are stored a second time, in 8 bits.

    Given, with x (batch, tokens, 16)::

        y = MatMul(x, w)

    Result::

        x_0 = If(switch) {DequantizeLinear(QuantizeLinear(x, s), s)} else {Identity(x)}
        w_0 = If(switch) {DequantizeLinear<axis=1>(w_codes, w_scales)} else {Identity(w)}
        y = MatMul(x_0, w_0)

    An Attention is written as two products and a softmax in float32, with its four operands behind the switch.

    Args:
        model: In float32; not changed.
        layers: Each with the index of its switch.
        table: The ranges of what they read.
        precision: `fp8` or `int8`.
        weights: Codes of weights that are not rounded to nearest, by the weights' names.
        corrections: What is added to the outputs of quantised layers, (outputs,) by the names of their nodes.

    Raises:
        IsthmusError: The table lacks a range.
    """
    copy = model.clone()
    ExpandAttentionMask()(copy)
    nodes = {node.name: node for node in copy.graph}
    write = _Writer(copy.graph, table, precision, weights or {}, corrections or {})
    indices = sorted({index for _, index in layers})
    for index in indices:
        value = ir.Value(name=switch(index), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        copy.graph.inputs.append(value)
        write.switches[index] = value
    for layer, index in layers:
        write.layer(nodes[layer.node], layer, index)
    return copy


class _Writer:
    def __init__(
        self,
        graph: ir.Graph,
        table: CalibrationTable,
        precision: str,
        weights: Mapping[str, RoundedWeight],
        corrections: Mapping[str, Array],
    ) -> None:
        self.switches: dict[int, ir.Value] = {}
        self._graph, self._table, self._precision = graph, table, precision
        self._weights, self._corrections = weights, corrections
        self._count = 0

    def layer(self, node: ir.Node, layer: Layer, index: int) -> None:
        """Puts the operands of a layer behind a switch."""
        if layer.kind == "attention":
            self._attention(node, layer, index)
            return
        self._activation(node, 0, layer.observed[0], index)
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        codes, scales = self._codes(node, layer, weight.name or "", weight.const_value.numpy())
        stored, factors = self._constant(codes), self._constant(scales.astype(np.float32))
        self._behind(node, 1, index, lambda _: [ir.node("DequantizeLinear", [stored, factors], {"axis": layer.axis})])
        if (added := self._corrections.get(layer.node)) is not None:
            self._correction(node, np.asarray(added, np.float32), index)
        if is_op(node, "Conv") and len(layer.observed) > 1:
            self._result(node, layer.observed[1], index)

    def _attention(self, node: ir.Node, layer: Layer, index: int) -> None:
        if self._precision != "fp8":
            raise IsthmusError(f"attention is not quantised to {self._precision}", hint="this is a bug; please report it")
        q, k, v = (self._table.interval(name, "e4m3").high for name in layer.observed)
        written = write_attention(node, self._graph, softmax=ir.DataType.FLOAT)
        scaled = written.scores.inputs[0]
        factor = scaled.producer() if scaled is not None else None
        scale = ir.convenience.get_const_tensor(factor.inputs[1]) if factor is not None and factor.inputs[1] is not None else None
        assert scale is not None
        for product, operand, largest in (
            (written.scores, 0, q * abs(float(scale.numpy()))),
            (written.keys, 0, k),
            (written.values, 0, quantize_fp8.SOFTMAX_RANGE),
            (written.values, 1, v),
        ):
            self._fp8(product, operand, largest, index)

    def _activation(self, node: ir.Node, operand: int, name: str, index: int) -> None:
        if self._precision == "fp8":
            self._fp8(node, operand, self._table.interval(name, "e4m3").high, index)
            return
        scale, zero = quantize_int8.stored(self._table.interval(name, quantize_int8.ACTIVATIONS))
        factor, zero_point = self._constant(scale), self._constant(zero)

        def quantised(value: ir.Value) -> list[ir.Node]:
            stored = ir.node("QuantizeLinear", [value, factor, zero_point])
            return [stored, ir.node("DequantizeLinear", [stored.outputs[0], factor, zero_point])]

        self._behind(node, operand, index, quantised)

    def _fp8(self, node: ir.Node, operand: int, largest: float, index: int) -> None:
        # The scale is the one that the artifact has, a number of float16.
        factor = self._constant(quantize_fp8.scales(np.array(largest), _HALF).astype(np.float32))

        def quantised(value: ir.Value) -> list[ir.Node]:
            stored = ir.node("QuantizeLinear", [value, factor], {"output_dtype": int(_E4M3)})
            return [stored, ir.node("DequantizeLinear", [stored.outputs[0], factor])]

        self._behind(node, operand, index, quantised)

    def _codes(self, node: ir.Node, layer: Layer, name: str, weight: Array) -> tuple[Array, Array]:
        """The codes of a weight in its own layout, and its scales (outputs,)."""
        axis = layer.axis
        if self._precision == "fp8":
            scales, grid, dtype = quantize_fp8.weight_scales(weight, axis, _HALF), GRIDS["e4m3"], np.dtype(ml_dtypes.float8_e4m3fn)
        else:
            grid, dtype = GRIDS[quantize_int8.WEIGHTS], np.dtype(np.int8)
            if is_op(node, "Conv"):
                scale, _ = quantize_int8.stored(self._table.interval(layer.observed[0], quantize_int8.ACTIVATIONS))
                bias = constant_tensor(input_at(node, 2))
                scales = quantize_int8.kernel_scales(weight, bias.numpy() if bias is not None else None, float(scale))
            else:
                scales = quantize_int8.weight_scales(weight, axis)
        rounded = self._weights.get(name)
        if rounded is not None:
            rounded.check(name, weight.shape[axis], weight.shape[1 - axis])
            return np.ascontiguousarray((rounded.codes.T if axis == 1 else rounded.codes).astype(dtype)), rounded.scale
        shape = [1] * weight.ndim
        shape[axis] = -1
        parameters = Parameters(scales.astype(np.float64).reshape(shape), 0.0)
        return grid.codes(weight, parameters).astype(np.float32).astype(dtype), scales

    def _result(self, node: ir.Node, name: str, index: int) -> None:
        """Puts what a convolution computes behind a switch, or what a function makes of it that alone reads it."""
        value = node.outputs[0]
        if value.name != name:
            value = next(user.outputs[0] for user, _ in value.uses())
        users = list(value.uses())
        producer = value.producer()
        assert producer is not None
        same = ir.node("Identity", [value], name=f"{node.name}/result")
        made = same.outputs[0]
        made.name, made.type, made.shape = f"{name}.result", value.type, value.shape
        for user, position in users:
            user.replace_input_with(position, made)
        self._graph.insert_after(producer, same)
        self._activation(same, 0, name, index)

    def _correction(self, node: ir.Node, added: Array, index: int) -> None:
        value, nothing, vector = node.outputs[0], self._constant(np.zeros_like(added)), self._constant(added)
        users = list(value.uses())
        sum_ = ir.node("Add", [value, nothing], name=f"{node.name}/corrected")
        made = sum_.outputs[0]
        made.type, made.shape = value.type, value.shape
        name = value.name
        for user, position in users:
            user.replace_input_with(position, made)
        if value.is_graph_output():
            self._graph.outputs[list(self._graph.outputs).index(value)] = made
        value.name, made.name = f"{name}.uncorrected", name
        self._graph.insert_after(node, sum_)
        self._behind(sum_, 1, index, lambda _: [ir.node("Identity", [vector])])

    def _behind(self, node: ir.Node, operand: int, index: int, make: Callable[[ir.Value], list[ir.Node]]) -> None:
        """Makes an input of a node what nodes make of it where the switch is on, and leaves it as it is where it is off."""
        value = node.inputs[operand]
        assert value is not None
        self._count += 1
        name = f"isthmus.switched.{self._count}"
        branches = {}
        for branch, nodes in (("then_branch", make(value)), ("else_branch", [ir.node("Identity", [value])])):
            for position, made in enumerate(nodes):
                made.name = made.outputs[0].name = f"{name}.{branch}.{position}"
            result = nodes[-1].outputs[0]
            result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            branches[branch] = ir.AttrGraph(branch, ir.Graph([], [result], nodes=nodes, name=f"{name}.{branch}"))
        chosen = ir.Node("", "If", [self.switches[index]], attributes=list(branches.values()), num_outputs=1, name=name)
        out = chosen.outputs[0]
        out.name, out.type, out.shape = name, ir.TensorType(ir.DataType.FLOAT), value.shape
        self._graph.insert_before(node, chosen)
        node.replace_input_with(operand, out)

    def _constant(self, array: Array) -> ir.Value:
        self._count += 1
        tensor = ir.tensor(np.asarray(array), name=f"isthmus.quantised.{self._count}")
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
        self._graph.register_initializer(value)
        return value


def products(model: ir.Model) -> list[ir.Node]:
    """The matrix products and attentions of the main graph: what floating point operations are counted of."""
    return [node for node in model.graph if is_op(node, "MatMul", "Gemm", "Conv", "ConvTranspose", "Attention")]
