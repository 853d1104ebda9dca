"""Rounds the weights of a graph's layers with regard to the activations that they meet, and says what their outputs lack on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..exporter.grids import GRIDS, RoundedWeight, WeightGrid
from ..exporter.passes import quantize_fp8, quantize_int8
from ..exporter.passes.fp8_layers import Layer
from ..exporter.spec import Arrays
from .observe import Observer
from .rounding import bias_correction, gptq
from .statistics import LIMIT, channels, grams

Array = np.ndarray[Any, Any]

_CODES = {"int8": np.dtype(np.int8), "e4m3": np.dtype(ml_dtypes.float8_e4m3fn)}


def gptq_weights(
    model: ir.Model, layers: Sequence[Layer], observer: Observer, sets: Sequence[Arrays], grid: WeightGrid, *, limit: int = LIMIT
) -> dict[str, RoundedWeight]:
    """The codes of layers' weights by GPTQ, by the weights' names. The scales are those of nearest rounding.

    The graph runs on all inputs once more, or as often as `limit` asks for.

    Args:
        model: The float32 graph.
        layers: Those that are quantised. Only products with a matrix are rounded: the inputs of a convolution's weight are no vectors.
        observer: Of that graph, with the layers' activations.
        sets: Calibration inputs.
        grid: What the weights are stored on: `int8` for `QuantizeInt8`, `e4m3` for `QuantizeFp8` on float16.
        limit: Bytes of second moments that are held at a time.

    Raises:
        IsthmusError: See `Observer.stream` and `rounding.gptq`.
    """
    matrices = _matrices(model, layers)
    sizes = {activation: int(weight.shape[1 - axis]) for activation, _, weight, axis in matrices.values()}
    found: dict[str, RoundedWeight] = {}
    for activation, gram, _ in grams(observer, sets, sizes, limit=limit):
        for name, (read, _, weight, axis) in matrices.items():
            if read == activation:
                scale = _scales(weight, axis, grid)
                codes = gptq(weight.T if axis == 1 else weight, gram, scale.astype(np.float64), GRIDS[grid])
                found[name] = RoundedWeight(codes.astype(np.float32).astype(_CODES[grid]), scale)
    return found


def corrections(
    model: ir.Model, layers: Sequence[Layer], observer: Observer, sets: Sequence[Arrays], weights: Mapping[str, RoundedWeight]
) -> dict[str, Array]:
    """What the outputs of layers lack on average because of their weights' rounding: (outputs,) float32 by the name of the layer's node.

    The arguments are those of `gptq_weights`, and what it gives; layers of other weights are left out.
    """
    matrices = _matrices(model, layers)
    means = channels(observer, sets, list(dict.fromkeys(activation for activation, *_ in matrices.values())))
    found = {}
    for name, (activation, nodes, weight, axis) in matrices.items():
        if name in weights:
            read = weights[name].codes.astype(np.float64) * weights[name].scale.astype(np.float64)[:, None]
            added = bias_correction(weight.T if axis == 1 else weight, read, means[activation].means).astype(np.float32)
            found.update(dict.fromkeys(nodes, added))
    return found


def _matrices(model: ir.Model, layers: Sequence[Layer]) -> dict[str, tuple[str, list[str], Array, int]]:
    """By the name of a matrix: the first activation that it multiplies, its layers' nodes, its numbers, and the axis of its outputs."""
    nodes = {node.name: node for node in model.graph}
    found: dict[str, tuple[str, list[str], Array, int]] = {}
    for layer in layers:
        value = nodes[layer.node].inputs[1] if layer.kind == "weight" else None
        if value is None or value.const_value is None or len(value.const_value.shape) != 2:
            continue
        known = found.get(value.name or "")
        names = [*known[1], layer.node] if known is not None else [layer.node]
        found[value.name or ""] = (known[0] if known is not None else layer.observed[0], names, value.const_value.numpy(), layer.axis)
    return found


def _scales(weight: Array, axis: int, grid: WeightGrid) -> Array:
    if grid == "int8":
        return quantize_int8.weight_scales(weight, axis)
    return quantize_fp8.weight_scales(weight, axis, ir.DataType.FLOAT16)
