"""Finds the values of a calibration table in an ML Program: which layer of the program is which layer of the ONNX graph.

The table names values of the ONNX graph, which a program that was converted from PyTorch does not have. Both note the PyTorch module of
every operation, and both are in the order of the PyTorch program: the n-th layer of a module is the same layer in both. Where a module has
not as many layers here as there, none of them is taken.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...exporter.grids import RoundedWeight
from ...exporter.passes.layer_values import LayerValues
from ...exporter.ranges import CalibrationTable

Array = np.ndarray[Any, Any]

GRID = "int8"
"""Of activations: symmetric, as Core ML's 8-bit multipliers have it."""

FUSED = frozenset({"relu", "relu6", "leaky_relu", "tanh", "sigmoid"})
"""Functions that Core ML computes with the layer before them: the result of both is what is rounded."""


@dataclass(frozen=True)
class Range:
    """What is represented of a value of the program.

    Attributes:
        value: The value's name in the table.
        amax: The largest |value|.
    """

    value: str
    amax: float


@dataclass(frozen=True)
class Calibration:
    """What a calibration says of a program.

    Attributes:
        ranges: By the name of a value of the program.
        reasons: Why there is no range, by the name of a value of the program.
        weights: Codes of weights that are not rounded to nearest, by the name of the layer's result.
        corrections: (outputs,) what is added to a layer's bias, by the name of the layer's result.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, RoundedWeight] = field(default_factory=dict)
    corrections: Mapping[str, Array] = field(default_factory=dict)


Calibrate = Callable[[Any], Calibration]
"""From a program that was loaded to what the calibration says of it."""


def calibration_of(
    program: Any,
    modules: Mapping[str, str],
    layers: Sequence[LayerValues],
    table: CalibrationTable,
    *,
    weights: Mapping[str, RoundedWeight] | None = None,
    corrections: Mapping[str, Array] | None = None,
) -> Calibration:
    """What a table says of a program.

    Args:
        program: From `interpreter.load`.
        modules: The PyTorch module of each of its values; see `modules.read_modules`.
        layers: Those of the ONNX graph that the table is of.
        table: With ranges for int8.
        weights: By the name of a weight of the ONNX graph, its codes.
        corrections: By the name of a node of the ONNX graph.
    """
    ranges: dict[str, Range] = {}
    reasons: dict[str, str] = {}
    codes: dict[str, RoundedWeight] = {}
    added: dict[str, Array] = {}
    there: dict[str, list[LayerValues]] = collections.defaultdict(list)
    for layer in layers:
        there[layer.module].append(layer)
    here: dict[str, list[Any]] = collections.defaultdict(list)
    for operation in layer_operations(program):
        here[_path(modules.get(operation.outputs[0].name, ""))].append(operation)
    for module, operations in here.items():
        same = there.get(module, [])
        if len(same) != len(operations):
            what = f"{module or 'the model'} has {len(operations)} layers in this program and {len(same)} in the graph that was calibrated"
            reasons.update({v.name: what for op in operations for v in (source_of(op), op.outputs[0])})
            continue
        for operation, layer in zip(operations, same, strict=True):
            result, last = operation.outputs[0], result_of(operation)
            for value, name in ((source_of(operation), layer.operand), (last, layer.result)):
                if value is last and (last is not result) != bool(layer.activation):
                    reasons[value.name] = "it is another value than the one that was calibrated"
                elif name in table.values:
                    ranges.setdefault(value.name, Range(name, table.interval(name, GRID).high))
            if weights and layer.weight in weights:
                codes[result.name] = weights[layer.weight]
            if corrections and layer.node in corrections:
                added[result.name] = corrections[layer.node]
    return Calibration(ranges, reasons, codes, added)


def layer_operations(program: Any) -> Iterator[Any]:
    """The operations of a program that multiply an activation by a constant, in order."""
    from .interpreter.program import operations_in

    for function in program.functions.values():
        for operation in operations_in(function):
            if operation.op_type in ("linear", "conv"):
                constant = operation.weight.val is not None
            elif operation.op_type == "matmul":
                constant = (operation.x.val is None) != (operation.y.val is None)
            else:
                continue
            if constant:
                yield operation


def source_of(operation: Any) -> Any:
    """The activation that a layer reads."""
    return operation.y if operation.op_type == "matmul" and operation.x.val is not None else operation.x


def result_of(operation: Any) -> Any:
    """What a layer computes, behind a function that Core ML computes with it."""
    value = operation.outputs[0]
    readers = value.child_ops
    if len(readers) == 1 and readers[0].op_type in FUSED and readers[0].enclosing_block is operation.enclosing_block:
        return readers[0].outputs[0]
    return value


def _path(module: str) -> str:
    """A module that is called again gets its path with "@1", "@2", … added."""
    return re.sub(r"@\d+", "", module)
