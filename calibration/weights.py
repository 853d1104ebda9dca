"""Rounds weights: on scales that a calibrator chooses, and by GPTQ, which also says what the outputs of their layers lack on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..exporter.grids import GRIDS, Parameters, RoundedWeight, WeightGrid, scale_of_each
from ..exporter.passes import quantize_fp8, quantize_int4
from ..exporter.passes.fp8_layers import Layer
from ..exporter.spec import Arrays
from .calibrator import channel_calibrator
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
    scales: str = "max",
    gathered: Gathering | None = None,
    limit: int = LIMIT,
) -> Rounded:
    """Rounds layers' weights by GPTQ.

    The graph runs on all inputs once more, or as often as `limit` asks for, unless the moments of its activations are gathered.

    Args:
        model: The float32 graph.
        layers: Those that are quantised. Only products with a matrix are rounded: the inputs of a convolution's weight are no vectors.
        observer: Of that graph, with the layers' activations.
        sets: Calibration inputs.
        grid: What the weights are stored on: `int8` for `QuantizeInt8`, `e4m3` for `QuantizeFp8` on float16, `int4` for `QuantizeInt4`.
        scales: The calibrator that chooses what each channel's scale represents, in `int4` each block's: one of `channel_calibrators`.
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
            scale = weight_scales(stored, layer, grid, scales)
            how = "rounded by GPTQ" if scales == "max" else f"rounded by GPTQ with scales by {scales}"
            rounded = RoundedWeight(gptq(weight, factor, scale, GRIDS[grid]).astype(_CODES[grid]), scale, how)
            added = bias_correction(weight, rounded.read(), moments_.means).astype(np.float32)
            found.weights[name] = rounded
            found.corrections.update(dict.fromkeys(nodes, added))
    return found


def scaled_weights(model: ir.Model, layers: Sequence[Layer], grid: WeightGrid, scales: str) -> dict[str, RoundedWeight]:
    """Rounds layers' weights to nearest, on scales that a calibrator chooses; by the weights' names.

    Args:
        model: See `gptq_weights`, as for all others.
        layers: See there.
        grid: See there.
        scales: See there.
    """
    found = {}
    for name, (_, _, tensor, layer) in _matrices(model, layers).items():
        stored = tensor.numpy()
        weight = stored.T if layer.axis == 1 else stored
        scale = weight_scales(stored, layer, grid, scales)
        codes = GRIDS[grid].codes(weight, Parameters(scale_of_each(scale, weight.shape[1]), 0.0)).astype(np.float32).astype(_CODES[grid])
        found[name] = RoundedWeight(codes, scale, f"rounded to nearest with scales by {scales}")
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


def weight_scales(weight: Array, layer: Layer, grid: WeightGrid, method: str) -> Array:
    """The scales of a layer's matrix, as the passes write them: float, (outputs,), in `int4` (outputs, blocks).

    Args:
        weight: The matrix, in the graph's layout.
        layer: The layer.
        grid: What it is stored on.
        method: One of `calibrator.channel_calibrators`, which chooses what is represented.

    Raises:
        UnknownNameError: There is no such calibrator of weights.
    """
    calibrator = channel_calibrator(method)
    if grid == "int4":
        rows = weight.T if layer.axis == 1 else weight
        represented = calibrator.channels(rows.reshape(-1, layer.block), 0, GRIDS[grid])
        return quantize_int4.scales(represented.amax.reshape(len(rows), -1))
    represented = calibrator.channels(weight, layer.axis, GRIDS[grid])
    if grid == "int8":
        return np.asarray(GRIDS[grid].parameters(represented).scale, np.float32)
    return quantize_fp8.scales(represented.amax, ir.DataType.FLOAT16)
