"""Writes the chosen layers of a graph in INT8, as QuantizeLinear and DequantizeLinear pairs, for ONNX Runtime's integer products."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import IsthmusError
from ..grids import GRIDS, Interval, Parameters, RoundedWeight
from ._quantized import constant_of, drop_unread, put_in_place
from ._rewrite import attribute_int, constant_tensor, dims, input_at, is_op, new_node
from .fp8_layers import Excluded, Layer, Selection
from .layer_values import layer_values

Array = np.ndarray[Any, Any]

ACTIVATIONS = "uint8"
"""The grid of activations: ONNX Runtime's products on x86 take them without sign, and with a zero point one-sided ranges lose no bit."""

WEIGHTS = "int8"
"""The grid of weights: symmetric, so that zero points cost nothing."""


_FIRST_AXIS = "const/int8.first_axis"

_OUTPUT = "a convolution whose result is the model's own: ONNX Runtime convolves in integers where something reads the result in 8 bits"


class QuantizeInt8(ir.passes.InPlacePass):
    """Puts QuantizeLinear and DequantizeLinear around the operands of the selected products of an activation and a weight.

    Activations are uint8 with one scale and zero point, weights int8 with one scale an output channel and no zero point. ONNX Runtime
    fuses the result to MatMulIntegerToFloat (its QDQ transformer, extended level, 1.32), which sums up in int32.

    Before that it makes Gemm of a MatMul of static shapes with a vector added, which it does not compute in integers (MatMulAddFusion,
    level basic, 1.32). What is added is therefore written with as many axes as the product has, of which there are at least three.

    Given, with x (batch, tokens, 16)::

        y = Add(MatMul(x, w), b)

    Result::

        q = QuantizeLinear(x, x_scale, x_zero)
        d = DequantizeLinear(q, x_scale, x_zero)
        v = DequantizeLinear<axis=1>(w_int8, w_scale)
        y = Add(MatMul(d, v), b of shape [1, 1, 32])

    Given, with x (batch, 16)::

        y = Gemm<transB=1>(x, w, b)

    Result::

        q = QuantizeLinear(Unsqueeze(x, 0), x_scale, x_zero)
        d = DequantizeLinear(q, x_scale, x_zero)
        v = DequantizeLinear<axis=1>(w_int8 transposed, w_scale)
        y = Squeeze(Add(MatMul(d, v), b of shape [1, 1, 32]), 0)

    A convolution computes in integers where its output is in 8 bits too (QLinearConv). Given, with w (32, 16, 3, 3)::

        y = Relu(Conv(x, w, b))

    Result, of which ONNX Runtime takes the Relu out, because the zero point of what is never negative is 0::

        q = QuantizeLinear(x, x_scale, x_zero)
        d = DequantizeLinear(q, x_scale, x_zero)
        v = DequantizeLinear<axis=0>(w_int8, w_scale)
        z = QuantizeLinear(Relu(Conv(d, v, b)), y_scale, y_zero)
        y = DequantizeLinear(z, y_scale, y_zero)

    Args:
        layers: The layers, of kind `weight` (see `choose`).
        intervals: What is represented of every observed activation, by its name.
        weights: By the name of a weight, its codes; weights that are not named are rounded to nearest, with scales of their largest values.
        corrections: By the name of a layer's node, (outputs,) what is added to its output.

    Attributes:
        written: The names of the products that are now INT8, with their modules.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        intervals: Mapping[str, Interval],
        *,
        weights: Mapping[str, RoundedWeight] | None = None,
        corrections: Mapping[str, Array] | None = None,
    ) -> None:
        if missing := [name for layer in layers for name in layer.observed if name not in intervals]:
            raise IsthmusError(f"the calibration has no range for {', '.join(missing)}", hint="calibrate again for this model")
        self._layers, self._intervals = layers, intervals
        self._weights, self._corrections = weights or {}, corrections or {}
        self.written: list[tuple[str, str]] = []
        self._read_back: dict[ir.Value, str] = {}  # what is in 8 bits already, with the name of the value that it stands for

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph in place."""
        nodes = {node.name: node for node in model.graph}
        activations: dict[ir.Value, ir.Value] = {}
        weights: dict[tuple[ir.Value, int], ir.Value] = {}
        for layer in self._layers:
            self._layer(model.graph, nodes[layer.node], layer, activations, weights)
        return ir.passes.PassResult(model, modified=bool(self.written))

    def _layer(
        self,
        graph: ir.Graph,
        node: ir.Node,
        layer: Layer,
        activations: dict[ir.Value, ir.Value],
        weights: dict[tuple[ir.Value, int], ir.Value],
    ) -> None:
        activation, weight = node.inputs[0], node.inputs[1]
        assert activation is not None
        assert weight is not None
        if is_op(node, "Conv"):
            self._convolution(graph, node, layer, activations)
            self.written.append((layer.node, layer.module))
            return
        rank = len(dims(activation) or ())
        if activation not in activations:
            activations[activation] = self._activation(graph, node, activation, self._intervals[layer.observed[0]], wide=rank == 2)
        if (weight, layer.axis) not in weights:
            weights[weight, layer.axis] = self._weight(graph, node, weight, layer.axis)
        nodes = [new_node(node, "MatMul", [activations[activation], weights[weight, layer.axis]])]
        for addend in self._addends(graph, node, layer, max(rank, 3)):
            nodes.append(new_node(node, "Add", [nodes[-1].outputs[0], addend]))
        if rank == 2:
            nodes.append(new_node(node, "Squeeze", [nodes[-1].outputs[0], _first_axis(graph)]))
        shape = list(dims(node.outputs[0]) or ())
        put_in_place(graph, node, nodes, between=shape if len(shape) > 2 else [1, *shape])
        if rank > 2:
            _widen_biases(graph, nodes[-1].outputs[0], rank)
        drop_unread(graph, weight)
        self.written.append((layer.node, layer.module))

    def _convolution(self, graph: ir.Graph, node: ir.Node, layer: Layer, activations: dict[ir.Value, ir.Value]) -> None:
        activation, weight = node.inputs[0], node.inputs[1]
        assert activation is not None
        assert weight is not None
        if self._read_back.get(activation) != layer.observed[0]:
            if activation not in activations:
                activations[activation] = self._activation(graph, node, activation, self._intervals[layer.observed[0]], wide=False)
            node.replace_input_with(0, activations[activation])
        node.replace_input_with(1, self._kernel(graph, node, weight, self._intervals[layer.observed[0]]))
        drop_unread(graph, weight)
        result = node.outputs[0]
        if result.name != layer.observed[1]:
            result = next(reader.outputs[0] for reader, _ in result.uses())  # a Relu, see `choose`
        after = result.producer()
        assert after is not None
        users = list(result.uses())
        read = self._activation(graph, after, result, self._intervals[layer.observed[1]], wide=False, behind=True)
        for user, index in users:
            user.replace_input_with(index, read)
        self._read_back[read] = layer.observed[1]

    def _kernel(self, graph: ir.Graph, node: ir.Node, weight: ir.Value, interval: Interval) -> ir.Value:
        """A convolution's weight as it is read back, (outputs, inputs, …)."""
        name, source, bias = weight.name or "", weight.const_value, constant_tensor(input_at(node, 2))
        assert source is not None
        scale = kernel_scales(source.numpy(), bias.numpy() if bias is not None else None, float(stored(interval)[0]))
        shape = tuple(source.shape.numpy())
        parameters = Parameters(scale.astype(np.float64).reshape([-1] + [1] * (len(shape) - 1)), 0.0)
        tensor = ir.LazyTensor(
            lambda: ir.tensor(GRIDS[WEIGHTS].codes(source.numpy(), parameters).astype(np.int8), name=f"{name}.int8"),
            dtype=ir.DataType.INT8, shape=ir.Shape(shape), name=f"{name}.int8", cache=False,
        )  # fmt: skip
        codes, factors = constant_of(graph, f"{name}.int8", tensor), constant_of(graph, f"{name}.scale", ir.Tensor(scale))
        read = new_node(node, "DequantizeLinear", [codes, factors], {"axis": 0})
        read.name = read.outputs[0].name = f"{node.name}/{name}.dequantized"
        read.outputs[0].type, read.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        graph.insert_before(node, read)
        return read.outputs[0]

    def _addends(self, graph: ir.Graph, node: ir.Node, layer: Layer, rank: int) -> list[ir.Value]:
        """What is added to a product: a Gemm's bias, and the correction."""
        found = []
        bias, correction = input_at(node, 2), self._corrections.get(layer.node)
        if bias is not None:
            found.append(_wide(graph, bias, rank))
        if correction is not None:
            shaped = np.asarray(correction, np.float32).reshape([1] * (rank - 1) + [-1])
            found.append(constant_of(graph, f"{layer.node}.correction", ir.Tensor(shaped)))
        return found

    def _activation(
        self, graph: ir.Graph, at: ir.Node, value: ir.Value, interval: Interval, *, wide: bool, behind: bool = False
    ) -> ir.Value:
        """A value as it is read back from 8 bits, by nodes before or behind another node."""
        scale, zero = stored(interval)
        factor = constant_of(graph, f"{value.name}.scale", ir.Tensor(scale))
        zero_point = constant_of(graph, f"{value.name}.zero_point", ir.Tensor(zero))
        made = [(new_node(at, "Unsqueeze", [value, _first_axis(graph)]), "wide", ir.DataType.FLOAT)] if wide else []
        source, shape = (made[0][0].outputs[0], [1, *(dims(value) or ())]) if wide else (value, list(dims(value) or ()))
        quantized = new_node(at, "QuantizeLinear", [source, factor, zero_point])
        dequantized = new_node(at, "DequantizeLinear", [quantized.outputs[0], factor, zero_point])
        made += [(quantized, "quantized", ir.DataType.UINT8), (dequantized, "dequantized", ir.DataType.FLOAT)]
        for node, what, dtype in made:
            node.name = node.outputs[0].name = f"{value.name}.{what}"
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), ir.Shape(shape)
        if behind:
            graph.insert_after(at, [node for node, *_ in made])
        else:
            graph.insert_before(at, [node for node, *_ in made])
        return dequantized.outputs[0]

    def _weight(self, graph: ir.Graph, before: ir.Node, weight: ir.Value, axis: int) -> ir.Value:
        name = weight.name or ""
        source = weight.const_value
        assert source is not None
        rounded = self._weights.get(name)
        shape = source.shape.numpy()
        inputs, outputs = shape[1 - axis], shape[axis]
        if rounded is None:
            scale = weight_scales(source.numpy(), axis)
            tensor: ir.TensorProtocol = ir.LazyTensor(
                lambda: ir.tensor(_nearest(source.numpy(), scale, axis), name=f"{name}.int8"),
                dtype=ir.DataType.INT8, shape=ir.Shape((inputs, outputs)), name=f"{name}.int8", cache=False,
            )  # fmt: skip
        else:
            rounded.check(name, outputs, inputs)
            scale = rounded.scale.astype(np.float32)
            tensor = ir.Tensor(np.ascontiguousarray(rounded.codes.T.astype(np.int8)))
        codes = constant_of(graph, f"{name}.int8", tensor)
        factors = constant_of(graph, f"{name}.scale", ir.Tensor(scale))
        node = new_node(before, "DequantizeLinear", [codes, factors], {"axis": 1})
        node.name = node.outputs[0].name = f"{name}.dequantized"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((inputs, outputs))
        graph.insert_before(before, node)
        return node.outputs[0]


def choose(selection: Selection, model: ir.Model) -> tuple[tuple[Layer, ...], tuple[Excluded, ...]]:
    """Of a selection, the layers that INT8 takes: products of an activation and a weight. The others, with the reasons.

    A convolution's output is observed as well: behind the Relu that follows it, where nothing else reads it.
    """
    values = {layer.node: layer for layer in layer_values(model)}
    nodes = {node.name: node for node in model.graph}
    unread = {value.name for value in model.graph.outputs if not value.uses()}
    layers, excluded = [], list(selection.excluded)
    for layer in selection.layers:
        node = nodes[layer.node]
        if reason := _unfit(node, layer):
            excluded.append(Excluded(layer.node, layer.module, reason))
        elif is_op(node, "Conv"):
            found = values[layer.node]
            computed = found.result if found.activation == "Relu" else found.product
            if computed in unread:
                excluded.append(Excluded(layer.node, layer.module, _OUTPUT))
            else:
                layers.append(dataclasses.replace(layer, observed=(*layer.observed, computed)))
        else:
            layers.append(layer)
    return tuple(layers), tuple(excluded)


def _unfit(node: ir.Node, layer: Layer) -> str:
    if layer.kind == "attention":
        return "attention: ONNX Runtime has no integer products of two activations that keep the softmax's resolution"
    if is_op(node, "Conv"):
        bias = input_at(node, 2)
        return "" if bias is None or constant_tensor(bias) is not None else "a convolution whose bias is no constant"
    if len(dims(node.inputs[0]) or ()) < 2:
        return "an activation of one axis, or of an unknown number"
    bias = input_at(node, 2)
    if bias is not None and ((tensor := constant_tensor(bias)) is None or len(tensor.shape) != 1):
        return "a Gemm whose bias is no constant vector"
    plain = all(node.attributes[name].as_float() == 1 for name in ("alpha", "beta") if name in node.attributes)
    return "" if not is_op(node, "Gemm") or (plain and not attribute_int(node, "transA", 0)) else "a Gemm with factors"


def stored(interval: Interval) -> tuple[Array, Array]:
    """The scale (float32) and zero point (uint8) of an activation, scalars."""
    scale, zero = GRIDS[ACTIVATIONS].parameters(interval)
    return np.array(scale, np.float32), np.array(zero, np.uint8)


def weight_scales(weight: Array, axis: int) -> Array:
    """The scales of a weight (outputs,), float32: its largest |value| an output channel, on the last code."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    grid = GRIDS[WEIGHTS]
    return np.asarray(grid.parameters(grid.interval(weight.min(axis=others), weight.max(axis=others))).scale, np.float32)


def kernel_scales(weight: Array, bias: Array | None, scale: float) -> Array:
    """The scales of a convolution's weight (outputs,), float32: those of `weight_scales`, but no smaller than the bias allows.

    ONNX Runtime stores the bias as int32 on the product of both scales: that has to hold it, and where a channel's weights are all 0 it is
    what the channel computes.

    Args:
        weight: (outputs, inputs, …).
        bias: (outputs,), or None.
        scale: The activation's.
    """
    found = weight_scales(weight, 0).astype(np.float64)
    if bias is None:
        return found.astype(np.float32)
    largest = np.abs(bias.astype(np.float64)) / scale
    empty = np.abs(weight.reshape(len(weight), -1)).max(axis=1) == 0
    return np.where(empty & (largest > 0), largest / 2**20, np.maximum(found, largest / 2**30)).astype(np.float32)


def _nearest(weight: Array, scale: Array, axis: int) -> Array:
    """(inputs, outputs) codes of a matrix whose axis counts the outputs."""
    rows = weight if axis == 1 else weight.T
    return GRIDS[WEIGHTS].codes(rows, Parameters(scale.astype(np.float64), 0.0)).astype(np.int8)


def _widen_biases(graph: ir.Graph, value: ir.Value, rank: int) -> None:
    """Writes the vectors that are added to a product with as many axes as it has."""
    for node, index in value.uses():
        other = node.inputs[1 - index] if is_op(node, "Add") and len(node.inputs) == 2 else None
        tensor = constant_tensor(other) if other is not None else None
        if other is not None and tensor is not None and len(tensor.shape) == 1:
            node.replace_input_with(1 - index, _wide(graph, other, rank))
            drop_unread(graph, other)


def _wide(graph: ir.Graph, vector: ir.Value, rank: int) -> ir.Value:
    """A constant vector with axes of 1 before it."""
    tensor = constant_tensor(vector)
    assert tensor is not None
    return constant_of(graph, f"{vector.name}.wide", ir.Tensor(tensor.numpy().reshape([1] * (rank - 1) + [-1])))


def _first_axis(graph: ir.Graph) -> ir.Value:
    found = graph.initializers.get(_FIRST_AXIS)
    return found if found is not None else constant_of(graph, _FIRST_AXIS, ir.Tensor(np.array([0], np.int64)))
