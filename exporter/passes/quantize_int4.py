"""Stores the weights of the chosen products of a graph in INT4, in blocks that have a scale each; activations stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..grids import GRIDS, Parameters, RoundedWeight, scale_of_each
from ._quantized import constant_of, drop_unread, put_in_place
from ._rewrite import attribute_int, constant_tensor, dims, input_at, is_op, new_node
from .fp8_layers import Excluded, Layer, Selection, select

Array = np.ndarray[Any, Any]

GRID = "int4"
OPSET = 21
"""The first opset whose DequantizeLinear reads INT4 and takes blocks."""

_SMALLEST, _LARGEST = 2.0**-20, 65504.0
"""Of a scale: float16's largest number, and the smallest that has not lost its bits there. The codes are the same for all targets."""


class QuantizeInt4(ir.passes.InPlacePass):
    """Stores weights as INT4 with one scale for every block of neighbouring inputs of an output channel. Symmetric, no zero points.

    ONNX Runtime on the CPU makes MatMulNBits of the result (its QDQ transformer, 1.32), which never holds the weight in float32; it
    does not do so for Gemm, and so a Gemm becomes a MatMul and an Add. TensorRT-RTX 1.7.1 keeps such weights in INT4 in its plans.

    Given, with w (64, 32)::

        y = Gemm<transB=0>(x, w, b)

    Result, for blocks of 32::

        v = DequantizeLinear<axis=0, block_size=32>(w_int4, w_scale of shape [2, 32])
        y = Add(MatMul(x, v), b)

    Args:
        layers: The layers (see `choose`), whose `block` says what shares a scale.
        original: The float32 graph, from whose weights the codes are made.
        weights: By the name of a weight, its codes; weights that are not named are rounded to nearest, with scales of their largest values.
        corrections: By the name of a layer's node, (outputs,) what is added to its output.
        dtype: What the products compute in; those in another type are left alone.

    Attributes:
        written: The names of the products whose weights are now INT4, with their modules.
        skipped: Chosen layers that were left alone.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        original: ir.Model,
        *,
        weights: Mapping[str, RoundedWeight] | None = None,
        corrections: Mapping[str, Array] | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> None:
        self._layers, self._original, self._dtype = layers, original, dtype
        self._weights, self._corrections = weights or {}, corrections or {}
        self.written: list[tuple[str, str]] = []
        self.skipped: list[Excluded] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph in place."""
        nodes = {node.name: node for node in model.graph}
        made: dict[tuple[ir.Value, int, int], ir.Value] = {}
        for layer in self._layers:
            node = nodes[layer.node]
            if node.inputs[0] is None or node.inputs[0].dtype != self._dtype or node.outputs[0].dtype != self._dtype:
                reason = f"it does not compute in {self._dtype.name.lower()}: its values are beyond that range"
                self.skipped.append(Excluded(layer.node, layer.module, reason))
                continue
            self._layer(model.graph, node, layer, made)
        return ir.passes.PassResult(model, modified=bool(self.written))

    def _layer(self, graph: ir.Graph, node: ir.Node, layer: Layer, made: dict[tuple[ir.Value, int, int], ir.Value]) -> None:
        activation, weight = node.inputs[0], node.inputs[1]
        assert weight is not None
        key = (weight, layer.axis, layer.block)
        if key not in made:
            made[key] = self._weight(graph, node, weight, layer)
        nodes = [new_node(node, "MatMul", [activation, made[key]])]
        if (addend := self._addend(graph, node, layer)) is not None:
            nodes.append(new_node(node, "Add", [nodes[0].outputs[0], addend]))
        put_in_place(graph, node, nodes, between=list(dims(node.outputs[0]) or ()))
        drop_unread(graph, weight)
        self.written.append((layer.node, layer.module))

    def _addend(self, graph: ir.Graph, node: ir.Node, layer: Layer) -> ir.Value | None:
        """What is added to a product: a Gemm's bias, with the correction."""
        bias, correction = input_at(node, 2), self._corrections.get(layer.node)
        if correction is None:
            return bias
        tensor = constant_tensor(bias)
        added = np.asarray(correction, np.float64) + (tensor.numpy().astype(np.float64) if tensor is not None else 0.0)
        value = constant_of(graph, f"{layer.node}.correction", ir.tensor(added.astype(self._dtype.numpy())))
        if bias is not None:
            node.replace_input_with(2, None)
            drop_unread(graph, bias)
        return value

    def _weight(self, graph: ir.Graph, before: ir.Node, weight: ir.Value, layer: Layer) -> ir.Value:
        name, axis, block = weight.name or "", layer.axis, layer.block
        source = self._original.graph.initializers.get(name, weight).const_value
        assert source is not None
        shape = source.shape.numpy()
        inputs, outputs = shape[1 - axis], shape[axis]
        rounded = self._weights.get(name)
        if rounded is None:
            scale = weight_scales(source.numpy(), axis, block)
            tensor: ir.TensorProtocol = ir.LazyTensor(
                lambda: ir.tensor(_stored(nearest(source.numpy(), scale, axis)), name=f"{name}.int4"),
                dtype=ir.DataType.INT4, shape=ir.Shape((inputs, outputs)), name=f"{name}.int4", cache=False,
            )  # fmt: skip
        else:
            rounded.check(name, outputs, inputs)
            scale = rounded.scale
            tensor = ir.tensor(_stored(rounded.codes))
        codes = constant_of(graph, f"{name}.int4", tensor)
        factors = constant_of(graph, f"{name}.scale", ir.tensor(np.ascontiguousarray(scale.T).astype(self._dtype.numpy())))
        node = new_node(before, "DequantizeLinear", [codes, factors], {"axis": 0, "block_size": block})
        node.name = node.outputs[0].name = f"{name}.dequantized"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(self._dtype), ir.Shape((inputs, outputs))
        graph.insert_before(before, node)
        return node.outputs[0]


def choose(model: ir.Model, block: int, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Selection:
    """The products whose weights are stored in INT4, and those that are not, with the reasons.

    The first and the last products are left out by default, as in `fp8_layers.select`; those of the conditioning are not, which read their
    weights for one row a sample.

    Args:
        model: In float32, with shapes on its values.
        block: Inputs of a weight that share a scale.
        include: See `fp8_layers.select`.
        exclude: See there.
    """
    found = select(model, include=include, exclude=exclude, alignment=1, conditioning=True)
    nodes = {node.name: node for node in model.graph}
    layers, excluded = [], [e for e in found.excluded if not is_op(nodes[e.node], "Attention")]
    for layer in found.layers:
        if layer.kind == "attention":
            continue  # it has no weight
        if reason := _unfit(nodes[layer.node], layer, block):
            excluded.append(Excluded(layer.node, layer.module, reason))
        else:
            layers.append(dataclasses.replace(layer, block=block))
    return Selection(tuple(layers), tuple(excluded), found.unmatched)


def _unfit(node: ir.Node, layer: Layer, block: int) -> str:
    if is_op(node, "Conv"):
        return "a convolution: weights in 4 bits are read by matrix products alone"
    inputs = (dims(node.inputs[1]) or ())[1 - layer.axis]
    if not isinstance(inputs, int) or inputs % block:
        return f"{inputs} input channels, no multiple of the block of {block}"
    if len(dims(node.inputs[0]) or ()) < 2:
        return "an activation of one axis, or of an unknown number"
    bias = input_at(node, 2)
    if bias is not None and ((tensor := constant_tensor(bias)) is None or len(tensor.shape) != 1):
        return "a Gemm whose bias is no constant vector"
    plain = all(node.attributes[name].as_float() == 1 for name in ("alpha", "beta") if name in node.attributes)
    return "" if not is_op(node, "Gemm") or (plain and not attribute_int(node, "transA", 0)) else "a Gemm with factors"


def weight_scales(weight: Array, axis: int, block: int) -> Array:
    """(outputs, blocks) float32 scales of a matrix: of the largest |value| of each block, see `scales`.

    Args:
        weight: Two axes.
        axis: The one that counts the outputs.
        block: Inputs that share a scale, of which there is a multiple.
    """
    rows = weight.T if axis == 1 else weight
    return scales(np.abs(rows.reshape(len(rows), -1, block)).max(axis=2).astype(np.float64))


def scales(largest: Array) -> Array:
    """The scales (float32) that bring |values| of at most `largest` (float64) to the last code, as numbers that float16 holds.

    They are rounded upwards, so that the largest value does not saturate. Where `largest` is 0, any scale will do: it is 1.
    """
    exact = np.where(largest > 0, np.clip(largest / GRIDS[GRID].high, _SMALLEST, _LARGEST), 1.0)
    half = exact.astype(np.float16)
    above = np.minimum(np.nextafter(half, np.float16(np.inf)), np.float16(_LARGEST))
    return np.where(half.astype(np.float64) < exact, above, half).astype(np.float32)


def nearest(weight: Array, scale: Array, axis: int) -> Array:
    """(outputs, inputs) codes of a matrix, to nearest; the arguments are those of `weight_scales`, and what it gives."""
    rows = weight.T if axis == 1 else weight
    return GRIDS[GRID].codes(rows, Parameters(scale_of_each(scale, rows.shape[1]), 0.0)).astype(np.int8)


def _stored(codes: Array) -> Array:
    """(outputs, inputs) codes as (inputs, outputs) INT4."""
    return np.ascontiguousarray(codes.T.astype(np.int8)).astype(ml_dtypes.int4)
