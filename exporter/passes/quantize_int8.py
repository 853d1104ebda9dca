"""Writes the chosen layers of a graph in INT8, as QuantizeLinear and DequantizeLinear pairs, for ONNX Runtime's integer products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import IsthmusError
from ..grids import GRIDS, Interval, Parameters, RoundedWeight
from ._rewrite import attribute_int, constant_tensor, dims, input_at, is_op, new_node
from .fp8_layers import Excluded, Layer, Selection

Array = np.ndarray[Any, Any]

ACTIVATIONS = "uint8"
"""The grid of activations: ONNX Runtime's products on x86 take them without sign, and with a zero point one-sided ranges lose no bit."""

WEIGHTS = "int8"
"""The grid of weights: symmetric, so that zero points cost nothing."""


_FIRST_AXIS = "const/int8.first_axis"


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
        _put_in_place(graph, node, nodes)
        if rank > 2:
            _widen_biases(graph, nodes[-1].outputs[0], rank)
        if not weight.uses() and weight.is_initializer() and weight.name is not None:
            del graph.initializers[weight.name]
        self.written.append((layer.node, layer.module))

    def _addends(self, graph: ir.Graph, node: ir.Node, layer: Layer, rank: int) -> list[ir.Value]:
        """What is added to a product: a Gemm's bias, and the correction."""
        found = []
        bias, correction = input_at(node, 2), self._corrections.get(layer.node)
        if bias is not None:
            found.append(_wide(graph, bias, rank))
        if correction is not None:
            shaped = np.asarray(correction, np.float32).reshape([1] * (rank - 1) + [-1])
            found.append(_constant(graph, f"{layer.node}.correction", ir.tensor(shaped)))
        return found

    def _activation(self, graph: ir.Graph, before: ir.Node, value: ir.Value, interval: Interval, *, wide: bool) -> ir.Value:
        scale, zero = stored(interval)
        factor = _constant(graph, f"{value.name}.scale", ir.tensor(scale))
        zero_point = _constant(graph, f"{value.name}.zero_point", ir.tensor(zero))
        made = [(new_node(before, "Unsqueeze", [value, _first_axis(graph)]), "wide", ir.DataType.FLOAT)] if wide else []
        source, shape = (made[0][0].outputs[0], [1, *(dims(value) or ())]) if wide else (value, list(dims(value) or ()))
        quantized = new_node(before, "QuantizeLinear", [source, factor, zero_point])
        dequantized = new_node(before, "DequantizeLinear", [quantized.outputs[0], factor, zero_point])
        made += [(quantized, "quantized", ir.DataType.UINT8), (dequantized, "dequantized", ir.DataType.FLOAT)]
        for node, what, dtype in made:
            node.name = node.outputs[0].name = f"{value.name}.{what}"
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), ir.Shape(shape)
            graph.insert_before(before, node)
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
            tensor = ir.tensor(np.ascontiguousarray(rounded.codes.T.astype(np.int8)))
        codes = _constant(graph, f"{name}.int8", tensor)
        factors = _constant(graph, f"{name}.scale", ir.tensor(scale))
        node = new_node(before, "DequantizeLinear", [codes, factors], {"axis": 1})
        node.name = node.outputs[0].name = f"{name}.dequantized"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((inputs, outputs))
        graph.insert_before(before, node)
        return node.outputs[0]


def choose(selection: Selection, model: ir.Model) -> tuple[tuple[Layer, ...], tuple[Excluded, ...]]:
    """Of a selection, the layers that INT8 takes: products of an activation and a matrix. The others, with the reasons."""
    nodes = {node.name: node for node in model.graph}
    layers, excluded = [], list(selection.excluded)
    for layer in selection.layers:
        node = nodes[layer.node]
        if reason := _unfit(node, layer):
            excluded.append(Excluded(layer.node, layer.module, reason))
        else:
            layers.append(layer)
    return tuple(layers), tuple(excluded)


def _unfit(node: ir.Node, layer: Layer) -> str:
    if layer.kind == "attention":
        return "attention: ONNX Runtime has no integer products of two activations that keep the softmax's resolution"
    if is_op(node, "Conv"):
        return "a convolution: ONNX Runtime's integer one wants its output in 8 bits too"
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


def _nearest(weight: Array, scale: Array, axis: int) -> Array:
    """(inputs, outputs) codes of a matrix whose axis counts the outputs."""
    rows = weight if axis == 1 else weight.T
    return GRIDS[WEIGHTS].codes(rows, Parameters(scale.astype(np.float64), 0.0)).astype(np.int8)


def _put_in_place(graph: ir.Graph, old: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Puts a chain of nodes, the first of which takes over the name, in the place of a node."""
    value, last = old.outputs[0], nodes[-1].outputs[0]
    shape = list(dims(value) or ())
    for count, node in enumerate(nodes):
        node.name = old.name if not count else f"{old.name}/{node.op_type}.{count}"
        made = node.outputs[0]
        made.type = value.type
        made.shape = value.shape if made is last else ir.Shape(shape if len(shape) > 2 else [1, *shape])
        made.name = f"{node.name}.output"
        graph.insert_before(old, node)
    name = value.name
    if value.is_graph_output():
        last.metadata_props.update(value.metadata_props)
    value.replace_all_uses_with(last, replace_graph_outputs=True)
    value.name = None
    last.name = name
    graph.remove(old, safe=True)


def _widen_biases(graph: ir.Graph, value: ir.Value, rank: int) -> None:
    """Writes the vectors that are added to a product with as many axes as it has."""
    for node, index in value.uses():
        other = node.inputs[1 - index] if is_op(node, "Add") and len(node.inputs) == 2 else None
        tensor = constant_tensor(other) if other is not None else None
        if other is not None and tensor is not None and len(tensor.shape) == 1:
            node.replace_input_with(1 - index, _wide(graph, other, rank))
            if not other.uses() and other.is_initializer() and other.name is not None:
                del graph.initializers[other.name]


def _wide(graph: ir.Graph, vector: ir.Value, rank: int) -> ir.Value:
    """A constant vector with axes of 1 before it."""
    tensor = constant_tensor(vector)
    assert tensor is not None
    return _constant(graph, f"{vector.name}.wide", ir.tensor(tensor.numpy().reshape([1] * (rank - 1) + [-1])))


def _first_axis(graph: ir.Graph) -> ir.Value:
    found = graph.initializers.get(_FIRST_AXIS)
    return found if found is not None else _constant(graph, _FIRST_AXIS, ir.tensor(np.array([0], np.int64)))


def _constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    count = 1
    unique = name
    while unique in graph.initializers:
        count += 1
        unique = f"{name}.{count}"
    tensor.name = unique
    value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
    graph.register_initializer(value)
    return value
