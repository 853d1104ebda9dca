"""Activations in 8 bits: ranges from the interpreter, and the operations that quantise.

coremltools' `linear_quantize_activations` asks Core ML for the ranges, which is on macOS alone, and keeps those of the last sample only
(coremltools 9.0, `ModelDebugger.record_intermediate_output` overwrites what it then takes the minimum with).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .interpreter import Observed, observe

Array = np.ndarray[Any, Any]

# Functions that Core ML fuses with the layer before them: the result of both is what is quantised.
_FUSED = frozenset({"relu", "relu6", "leaky_relu", "tanh", "sigmoid"})

_STEPS = 127
"""int8's largest number: scales are symmetric, as Core ML's 8-bit multipliers have it, and -128 is not used."""


def quantize(program: Any, layers: Iterable[Any], samples: Sequence[Mapping[str, Array]]) -> list[dict[str, object]]:
    """Rounds what goes into the layers and what comes out of them to int8, with one scale for each tensor.

    A pair of `quantize` and `dequantize` stands before and behind each layer, the pattern that Core ML makes an 8-bit layer of. A result
    that the program returns is left as it is.

    Args:
        program: From `interpreter.load`; changed in place.
        layers: The operations `conv` and `linear` among these are taken; others are left.
        samples: Inputs that the ranges are found with.

    Returns:
        For the manifest, for each tensor: `name`, `operation` that it goes into or comes from, `bits`, `how`, and `range`; `reason` for a
        layer that is left.

    Raises:
        UsageError, UnsupportedError, IsthmusError: See `Interpreter.run`.
    """
    ranges = observe(program, samples)
    done: list[dict[str, object]] = []
    chosen = {layer for layer in layers if layer.op_type in ("conv", "linear")}
    for function in program.functions.values():
        _walk(function, chosen, ranges, done)
    return done


def _walk(block: Any, layers: set[Any], ranges: Mapping[str, Observed], done: list[dict[str, object]]) -> None:
    rounded: dict[Any, Any] = {}  # the values that have a pair already, and what is read instead
    with block:
        for operation in list(block.operations):
            for inner in operation.blocks:
                _walk(inner, layers, ranges, done)
            if operation not in layers:
                continue
            source = operation.x
            if source not in rounded:
                refused = _refused(source, ranges)
                entry: dict[str, object] = {"name": source.name, "operation": operation.op_type}
                done.append(entry | (_how(ranges[source.name]) if not refused else {"bits": 16, "reason": refused}))
                if refused:
                    continue
                rounded[source] = _pair(source, ranges[source.name], operation)
            operation.set_inputs(no_check_var_types=True, **{**operation.inputs, "x": rounded[source]})
            last = operation
            readers = operation.outputs[0].child_ops
            if len(readers) == 1 and readers[0].op_type in _FUSED and readers[0].enclosing_block is block:
                last = readers[0]
            result = last.outputs[0]
            if result.consuming_blocks or not result.child_ops or _refused(result, ranges):
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


def _refused(variable: Any, ranges: Mapping[str, Observed]) -> str:
    """Why a value is not rounded to int8; empty when it is."""
    if variable.name not in ranges:
        return "the samples do not compute it"
    if not math.isfinite(ranges[variable.name].peak):
        return "it is infinite, or no number, in the samples"
    return ""


def _scale(observed: Observed, dtype: np.dtype[Any]) -> Array:
    """The step of the grid, no smaller than the dtype's smallest normal number."""
    return np.array(max(observed.peak / _STEPS, float(np.finfo(dtype).tiny)), dtype)


def _how(observed: Observed) -> dict[str, object]:
    return {"bits": 8, "how": "one scale", "range": [observed.low, observed.high]}


def _pair(variable: Any, observed: Observed, before: Any) -> Any:
    """The value rounded to int8 and back, computed before that operation."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    scale = _scale(observed, np.dtype(np.float16 if variable.dtype == types.fp16 else np.float32))
    name = f"{variable.name}_int8"
    rounded = Builder.quantize(input=variable, scale=scale, output_dtype="int8", name=name, before_op=before)
    return Builder.dequantize(input=rounded, scale=scale, name=f"{name}_wide", before_op=before)
