"""Writes the chosen layers of a half-precision graph in FP8, as QuantizeLinear and DequantizeLinear pairs, from which TensorRT makes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..errors import IsthmusError
from ..grids import RoundedWeight
from .fp8_layers import Excluded, Layer, Selection
from .write_attention import write_attention

E4M3_MAX = 448.0
_E4M3 = ir.DataType.FLOAT8E4M3FN
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

SMALLEST_SCALE = 2.0**-20
"""A scale below this has lost its bits to float16's subnormal numbers; a range that small is as good as zero."""

SOFTMAX_RANGE = 1.0
"""Largest value of a softmax, known without calibration: its scale is 1 / 448."""


class QuantizeFp8(ir.passes.InPlacePass):
    """Puts QuantizeLinear and DequantizeLinear around the operands of the selected layers. E4M3, symmetric, no zero points.

    Activations have one scale, range / 448, a constant in the type of the activation. A weight is stored as FP8 with one scale an output
    channel, max |w| / 448. Scales are rounded upwards, so that the largest value does not saturate.

    Given, with x and w in float16::

        y = MatMul(x, w)

    Result::

        q = QuantizeLinear<output_dtype=FLOAT8E4M3FN>(x, x_scale)
        d = DequantizeLinear(q, x_scale)
        v = DequantizeLinear<axis=1>(w_fp8, w_scale)    # w_fp8 stored as FLOAT8E4M3FN
        y = MatMul(d, v)

    Given, with q, k and v in float16::

        y = Attention<scale=s>(q, k, v)

    Result, which keeps FP8 only with the quantised weights p and with the scale multiplied in before the first product (measured with
    TensorRT-RTX 1.7; NVIDIA/TensorRT issue 4516 is what happens otherwise)::

        q_s = Mul(q, s)
        k_t = Transpose<perm=[0, 1, 3, 2]>(DequantizeLinear(QuantizeLinear(k, k_scale), k_scale))
        scores = MatMul(DequantizeLinear(QuantizeLinear(q_s, q_scale), q_scale), k_t)
        p = Softmax<axis=-1>(scores)
        y = MatMul(DequantizeLinear(QuantizeLinear(p, 1/448), 1/448), DequantizeLinear(QuantizeLinear(v, v_scale), v_scale))

    Args:
        selection: The layers, by the names of their nodes.
        ranges: The largest |value| of every observed activation of the selection.
        original: The float32 model, from whose weights the FP8 ones are made.
        weights: By the name of a matrix, its E4M3 codes; those that are not named are rounded to nearest,
            with scales of their largest values.

    Attributes:
        written: The names of the matrix products that are now FP8, with their modules.
        skipped: Selected layers that were left alone, because the graph computes them in float32.
    """

    def __init__(
        self,
        selection: Selection,
        ranges: Mapping[str, float],
        original: ir.Model,
        *,
        weights: Mapping[str, RoundedWeight] | None = None,
    ) -> None:
        missing = [name for name in selection.observed() if not math.isfinite(ranges.get(name, math.nan))]
        if missing:
            raise IsthmusError(f"the calibration has no finite range for {', '.join(missing)}", hint="calibrate again for this model")
        self._selection, self._ranges, self._original = selection, ranges, original
        self._rounded = weights or {}
        self.written: list[tuple[str, str]] = []
        self.skipped: list[Excluded] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph in place."""
        nodes = {node.name: node for node in model.graph}
        graph = _Writer(model.graph)
        for layer in self._selection.layers:
            node = nodes[layer.node]
            if node.outputs[0].dtype not in _HALF or any(v is not None and v.dtype not in _HALF for v in node.inputs[:1]):
                self.skipped.append(Excluded(layer.node, layer.module, "kept in float32: its values are beyond half precision's range"))
            elif layer.kind == "weight":
                self._weight(graph, node, layer)
            else:
                self._attention(graph, node, layer)
        return ir.passes.PassResult(model, modified=bool(self.written))

    def _weight(self, graph: _Writer, node: ir.Node, layer: Layer) -> None:
        weight = _input(node, 1)
        graph.quantize(node, 0, self._ranges[layer.observed[0]])
        source = self._original.graph.initializers.get(weight.name or "", weight).const_value
        assert source is not None
        node.replace_input_with(1, graph.weight(weight, source, layer.axis, node, self._rounded.get(weight.name or "")))
        if not weight.uses() and weight.is_initializer() and weight.name is not None:
            del graph.graph.initializers[weight.name]
        self.written.append((layer.node, layer.module))

    def _attention(self, graph: _Writer, node: ir.Node, layer: Layer) -> None:
        q, k, v = (self._ranges[name] for name in layer.observed)
        dtype = node.outputs[0].dtype
        assert dtype is not None
        # A softmax in float32, with casts around it, would keep the products from being fused.
        written = write_attention(node, graph.graph, softmax=dtype)
        scaled = written.scores.inputs[0]
        assert scaled is not None
        factor = ir.convenience.get_const_tensor(_input(scaled.producer(), 1))
        assert factor is not None
        graph.quantize(written.scores, 0, q * abs(float(factor.numpy())))
        graph.quantize(written.keys, 0, k)
        graph.quantize(written.values, 0, SOFTMAX_RANGE)
        graph.quantize(written.values, 1, v)
        self.written += [(f"{layer.node}/{part}", layer.module) for part in ("scores", "values")]


def _input(node: ir.Node | None, index: int) -> ir.Value:
    value = node.inputs[index] if node is not None else None
    assert value is not None
    return value


class _Writer:
    """Makes the nodes and constants; what several layers read is quantised once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._quantized: dict[tuple[ir.Value, float], ir.Value] = {}
        self._weights: dict[tuple[ir.Value, int], ir.Value] = {}
        self._names: dict[str, int] = {}

    def constant(self, array: np.ndarray[Any, Any], like: ir.Value) -> ir.Value:
        """A constant in the type of a value."""
        assert like.dtype is not None
        tensor = ir.tensor(array.astype(like.dtype.numpy()))
        count = len(self.graph.initializers)
        while (name := f"const/fp8.{count}") in self.graph.initializers:
            count += 1
        tensor.name = name
        value = ir.Value(name=name, type=ir.TensorType(like.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def quantize(self, node: ir.Node, index: int, largest: float) -> None:
        """Makes an input of a node come through quantising and dequantising."""
        node.replace_input_with(index, self._quantized_form(_input(node, index), largest, node))

    def _quantized_form(self, value: ir.Value, largest: float, before: ir.Node) -> ir.Value:
        scale = float(scales(np.array(largest), value.dtype))
        if (value, scale) not in self._quantized:
            factor = self.constant(np.array(scale), value)
            q = self._named(before, "QuantizeLinear", [value, factor], f"{value.name}.quantized", value, {"output_dtype": int(_E4M3)})
            self._quantized[value, scale] = self._named(before, "DequantizeLinear", [q, factor], f"{value.name}.dequantized", value, {})
        return self._quantized[value, scale]

    def weight(
        self, weight: ir.Value, source: ir.TensorProtocol, axis: int, before: ir.Node, rounded: RoundedWeight | None = None
    ) -> ir.Value:
        """The dequantised form of a weight that is stored in FP8; the stored half-precision one goes when nothing reads it."""
        if (weight, axis) not in self._weights:
            name = weight.name or ""
            shape = tuple(source.shape.numpy())
            if rounded is None:
                factors = weight_scales(source.numpy(), axis, weight.dtype)
                stored: ir.TensorProtocol = ir.LazyTensor(
                    lambda: ir.tensor(_rounded(source.numpy(), factors, axis), name=f"{name}.fp8"),
                    dtype=_E4M3, shape=ir.Shape(shape), name=f"{name}.fp8", cache=False,
                )  # fmt: skip
            else:
                rounded.check(name, shape[axis], shape[1 - axis])
                factors = np.asarray(rounded.scale, np.float64)
                held = factors.astype(weight.dtype.numpy()).astype(np.float64) if weight.dtype is not None else factors
                if not np.array_equal(held, factors):
                    raise IsthmusError(
                        f"the rounded weight {name} has scales that {weight.dtype} does not hold", hint="make them by quantize_fp8.scales"
                    )
                stored = ir.tensor(np.ascontiguousarray(rounded.codes.T if axis == 1 else rounded.codes), name=f"{name}.fp8")
            value = ir.Value(name=f"{name}.fp8", type=ir.TensorType(_E4M3), shape=ir.Shape(shape), const_value=stored)
            self.graph.register_initializer(value)
            factor = self.constant(factors, weight)
            dequantized = f"{name}.dequantized"
            self._weights[weight, axis] = self._named(before, "DequantizeLinear", [value, factor], dequantized, weight, {"axis": axis})
        return self._weights[weight, axis]

    def _named(
        self, before: ir.Node, op_type: str, inputs: list[ir.Value], name: str, like: ir.Value, attributes: dict[str, Any]
    ) -> ir.Value:
        """The result of a new node in front of another, whose module it has, with the shape of another value. A name is used once."""
        count = self._names[name] = self._names.get(name, 0) + 1
        node = ir.node(op_type, inputs, attributes, name=name if count == 1 else f"{name}.{count}")
        node.metadata_props.update(before.metadata_props)
        value, dtype = node.outputs[0], _E4M3 if op_type == "QuantizeLinear" else inputs[1].dtype
        assert dtype is not None
        value.name, value.type, value.shape = node.name, ir.TensorType(dtype), like.shape
        self.graph.insert_before(before, node)
        return value


def weight_scales(weight: np.ndarray[Any, Any], axis: int, dtype: ir.DataType | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The scales of a weight's output channels, which an axis counts: of the largest |value|, see `scales`."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    return scales(np.maximum(weight.max(axis=others), -weight.min(axis=others)).astype(np.float64), dtype)


def scales(largest: np.ndarray[Any, Any], dtype: ir.DataType | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The scales that bring |values| of at most `largest` into E4M3's range, as numbers that `dtype` holds, rounded upwards.

    Where `largest` is 0, any scale will do: it is 1.
    """
    assert dtype is not None
    exact = np.where(largest > 0, np.maximum(largest / E4M3_MAX, SMALLEST_SCALE), 1.0)
    rounded = exact.astype(dtype.numpy())
    above = np.nextafter(rounded, np.array(np.inf, rounded.dtype))
    return np.where(rounded.astype(np.float64) < exact, above, rounded).astype(np.float64)


def _rounded(weight: np.ndarray[Any, Any], factors: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
    """A weight in E4M3: to nearest, ties to even, nothing beyond 448."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    divided = weight / factors.astype(np.float32).reshape(shape)
    return np.clip(divided, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
