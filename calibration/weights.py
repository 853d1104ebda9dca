"""Rounds the weights of a graph's layers with regard to the activations that they meet, and says what their outputs lack on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..exporter.grids import GRIDS, RoundedWeight, WeightGrid
from ..exporter.passes import quantize_fp8, quantize_int4, quantize_int8
from ..exporter.passes.fp8_layers import Layer
from ..exporter.spec import Arrays
from .observe import Observer
from .rounding import bias_correction, factorised, gptq
from .statistics import LIMIT, Gathering, moments

Array = np.ndarray[Any, Any]

_CODES = {"int8": np.dtype(np.int8), "e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "int4": np.dtype(np.int8)}


class Rounded(NamedTuple):
    """Weights that are not rounded to nearest.

    Attributes:
        weights: Their codes, by the weights' names.
        corrections: What the outputs of their layers lack on average because of it, (outputs,) float32 by the names of the layers' nodes.
    """

    weights: dict[str, RoundedWeight]
    corrections: dict[str, Array]


def gptq_weights(
    model: ir.Model,
    layers: Sequence[Layer],
    observer: Observer,
    sets: Sequence[Arrays],
    grid: WeightGrid,
    *,
    gathered: Gathering | None = None,
    limit: int = LIMIT,
) -> Rounded:
    """Rounds layers' weights by GPTQ. The scales are those of nearest rounding.

    The graph runs on all inputs once more, or as often as `limit` asks for, unless the moments of its activations are gathered.

    Args:
        model: The float32 graph.
        layers: Those that are quantised. Only products with a matrix are rounded: the inputs of a convolution's weight are no vectors.
        observer: Of that graph, with the layers' activations.
        sets: Calibration inputs.
        grid: What the weights are stored on: `int8` for `QuantizeInt8`, `e4m3` for `QuantizeFp8` on float16, `int4` for `QuantizeInt4`.
        gathered: From `gathering`, once all inputs have passed by.
        limit: Bytes of second moments that are held at a time.

    Raises:
        IsthmusError: See `Observer.stream` and `rounding.gptq`.
    """
    matrices = _matrices(model, layers)
    found = Rounded({}, {})
    for activation, moments_ in moments(observer, sets, _sizes(matrices), gathered=gathered, limit=limit):
        factor = factorised(moments_.gram)
        for name, (read, nodes, tensor, layer) in matrices.items():
            if read != activation:
                continue
            stored = tensor.numpy()
            weight = stored.T if layer.axis == 1 else stored
            scale = _scales(stored, layer, grid)
            rounded = RoundedWeight(gptq(weight, factor, scale, GRIDS[grid]).astype(_CODES[grid]), scale)
            added = bias_correction(weight, rounded.read(), moments_.means).astype(np.float32)
            found.weights[name] = rounded
            found.corrections.update(dict.fromkeys(nodes, added))
    return found


def gathering(model: ir.Model, layers: Sequence[Layer], calls: int, *, limit: int = LIMIT) -> Gathering:
    """What `gptq_weights` needs of the activations, to be gathered in a pass over the data that is made anyway.

    Args:
        model: See `gptq_weights`, as for `layers` and `limit`.
        layers: See there.
        calls: The number of sets of calibration inputs.
        limit: See there.
    """
    return Gathering(_sizes(_matrices(model, layers)), calls, limit=limit)


def _sizes(matrices: Mapping[str, tuple[str, list[str], ir.TensorProtocol, Layer]]) -> dict[str, int]:
    """The activations that matrices are multiplied by, with their numbers of channels."""
    return {activation: tensor.shape.numpy()[1 - layer.axis] for activation, _, tensor, layer in matrices.values()}


def _matrices(model: ir.Model, layers: Sequence[Layer]) -> dict[str, tuple[str, list[str], ir.TensorProtocol, Layer]]:
    """By the name of a matrix: the first activation that it multiplies, its layers' nodes, its tensor, and the last of its layers.

    Numbers are not read here: a tensor may be a transposed weight that is computed anew by every read, and all at once are a second copy of
    the model.
    """
    nodes = {node.name: node for node in model.graph}
    found: dict[str, tuple[str, list[str], ir.TensorProtocol, Layer]] = {}
    for layer in layers:
        value = nodes[layer.node].inputs[1] if layer.kind == "weight" else None
        if value is None or value.const_value is None or len(value.const_value.shape) != 2:
            continue
        known = found.get(value.name or "")
        names = [*known[1], layer.node] if known is not None else [layer.node]
        found[value.name or ""] = (known[0] if known is not None else layer.observed[0], names, value.const_value, layer)
    return found


def _scales(weight: Array, layer: Layer, grid: WeightGrid) -> Array:
    if grid == "int8":
        return quantize_int8.weight_scales(weight, layer.axis)
    if grid == "int4":
        return quantize_int4.weight_scales(weight, layer.axis, layer.block)
    return quantize_fp8.weight_scales(weight, layer.axis, ir.DataType.FLOAT16)
