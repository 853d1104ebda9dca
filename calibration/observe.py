"""Observes the ranges of a graph's activations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..exporter.bundle import StageResult
from ..exporter.errors import IsthmusError
from ..exporter.ranges import Calibration
from ..exporter.spec import Arrays
from .data import CalibrationData, finite
from .metrics import DEFAULT_TOLERANCES
from .session import GraphSession
from .verify import CaseArrays, compare_cases, judge

MAX = "max"
"""The calibrator's name: the largest |value| that was seen."""

_SUFFIX = ".isthmus.peak"


class Observer:
    """A float32 graph in ONNX Runtime that also tells how large some of its values are.

    Only a number a value leaves ONNX Runtime: the graph that runs has the reductions in it.

    Args:
        model: The graph; not changed, and its weights are not copied.
        names: Names of values of the main graph.

    Raises:
        IsthmusError: A name is unknown, or ONNX Runtime refuses the graph.
        MachineError: onnxruntime is not installed.
    """

    def __init__(self, model: ir.Model, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._session = GraphSession(_with_peaks(model, names))

    def run(self, inputs: Arrays) -> Arrays:
        """The graph's own outputs by name.

        Raises:
            IsthmusError: ONNX Runtime fails.
        """
        return {name: array for name, array in self._session.run(inputs).items() if not name.endswith(_SUFFIX)}

    def observe(self, data: CalibrationData) -> Calibration:
        """The largest |value| of every named value over calibration data.

        Raises:
            IsthmusError: ONNX Runtime fails, or the data gives NaN or Inf.
        """
        peaks = dict.fromkeys(self._names, 0.0)
        for arrays in data.sets:
            outputs = self._session.run(arrays)
            # Not max(): NaN must win.
            peaks = {name: float(np.maximum(peak, outputs[name + _SUFFIX])) for name, peak in peaks.items()}
        return Calibration(ranges=finite(peaks), method=MAX, source=data.source, size=len(data.sets), sha256=data.sha256())


def check_graph(observer: Observer, inputs: CaseArrays, reference: CaseArrays) -> StageResult:
    """The stage `onnx` of a quantised artifact: the float32 graph that it is made from, in ONNX Runtime, over every case."""
    outputs = {case: observer.run(arrays) for case, arrays in inputs.items()}
    device = "CPUExecutionProvider, float32, before quantisation"
    return judge("onnx", compare_cases(reference, outputs), DEFAULT_TOLERANCES["fp32"], device=device)


def _with_peaks(model: ir.Model, names: Sequence[str]) -> ir.Model:
    copy = model.clone()
    graph = copy.graph
    values = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    missing = [name for name in names if name not in values]
    if missing:
        raise IsthmusError(f"the graph has no values {', '.join(missing)}", hint="calibrate the model that is exported")
    for name in names:
        size = ir.node("Abs", [values[name]])
        peak = ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0})
        value = peak.outputs[0]
        value.name, value.type, value.shape = name + _SUFFIX, ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.extend([size, peak])
        graph.outputs.append(value)
    return copy
