"""Activations in 8 bits: the operations that quantise, at the ranges of a calibration table.

coremltools' `linear_quantize_activations` asks Core ML for the ranges, which is on macOS alone, and keeps those of the last sample only
(coremltools 9.0, `ModelDebugger.record_intermediate_output` overwrites what it then takes the minimum with).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ...exporter.grids import GRIDS, Interval
from .ranges import GRID, Calibration, Range, result_of

Array = np.ndarray[Any, Any]


def quantize(program: Any, layers: Iterable[Any], calibration: Calibration) -> list[dict[str, object]]:
    """Rounds what goes into the layers and what comes out of them to int8, with one scale for each tensor.

    A pair of `quantize` and `dequantize` stands before and behind each layer, the pattern that Core ML makes an 8-bit layer of. A result
    that the program returns is left as it is.

    Args:
        program: From `interpreter.load`; changed in place.
        layers: The operations `conv` and `linear` among these are taken; others are left.
        calibration: The ranges of the program's values.

    Returns:
        For the manifest, for each tensor: `name`, `operation` that it goes into or comes from, `bits`, `how`, `range`, and `value`, its
        name in the calibration table; `reason` for a layer that is left.
    """
    done: list[dict[str, object]] = []
    chosen = {layer for layer in layers if layer.op_type in ("conv", "linear")}
    for function in program.functions.values():
        _walk(function, chosen, calibration, done)
    return done


def _walk(block: Any, layers: set[Any], calibration: Calibration, done: list[dict[str, object]]) -> None:
    ranges = calibration.ranges
    rounded: dict[Any, Any] = {}  # the values that have a pair already, and what is read instead
    with block:
        for operation in list(block.operations):
            for inner in operation.blocks:
                _walk(inner, layers, calibration, done)
            if operation not in layers:
                continue
            source = operation.x
            if source not in rounded:
                refused = _refused(source, calibration)
                entry: dict[str, object] = {"name": source.name, "operation": operation.op_type}
                done.append(entry | (_how(ranges[source.name]) if not refused else {"bits": 16, "reason": refused}))
                if refused:
                    continue
                rounded[source] = _pair(source, ranges[source.name], operation)
            operation.set_inputs(no_check_var_types=True, **{**operation.inputs, "x": rounded[source]})
            result = result_of(operation)
            last = result.op
            if result.consuming_blocks or not result.child_ops or _refused(result, calibration):
                continue
            after = _next(block, last)
            pair = _pair(result, ranges[result.name], after)
            block.replace_uses_of_var_after_op(anchor_op=pair.op, old_var=result, new_var=pair, no_check_var_types=True, force_replace=True)
            done.append({"name": result.name, "operation": last.op_type} | _how(ranges[result.name]))
            rounded[pair] = pair


def _next(block: Any, operation: Any) -> Any:
    """The operation behind this one."""
    found = False
    for other in block.operations:
        if found:
            return other
        found = other is operation
    raise AssertionError("a result that is read has an operation behind it")


def _refused(variable: Any, calibration: Calibration) -> str:
    """Why a value is not rounded to int8; empty when it is."""
    found = calibration.ranges.get(variable.name)
    if found is None:
        return calibration.reasons.get(variable.name, "the calibration has no such value")
    return "" if math.isfinite(found.amax) else "its range is infinite, or no number"


def _scale(found: Range, dtype: np.dtype[Any]) -> Array:
    """The step of the grid, no smaller than the dtype's smallest normal number."""
    step = float(GRIDS[GRID].parameters(Interval(-found.amax, found.amax)).scale)
    return np.array(max(step, float(np.finfo(dtype).tiny)), dtype)


def _how(found: Range) -> dict[str, object]:
    return {"bits": 8, "how": "one scale", "range": [-found.amax, found.amax], "value": found.value}


def _pair(variable: Any, found: Range, before: Any) -> Any:
    """The value rounded to int8 and back, computed before that operation."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    scale = _scale(found, np.dtype(np.float16 if variable.dtype == types.fp16 else np.float32))
    name = f"{variable.name}_int8"
    rounded = Builder.quantize(input=variable, scale=scale, output_dtype="int8", name=name, before_op=before)
    return Builder.dequantize(input=rounded, scale=scale, name=f"{name}_wide", before_op=before)
