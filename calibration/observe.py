"""Observes the values of a graph while it runs on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..exporter.errors import IsthmusError, Reason
from ..exporter.manifest import StageResult
from ..exporter.passes._rewrite import dims
from ..exporter.spec import Arrays
from ..exporter.subject import evaluate
from .data import CalibrationData
from .metrics import DEFAULT_TOLERANCES
from .observation import Observation
from .session import GraphSession
from .verify import CaseArrays, compare_cases, judge

Array = np.ndarray[Any, Any]

LIMIT = 2**30
"""Bytes of values that leave ONNX Runtime in one run; where there are more, the graph runs several times on the same inputs."""

_SHOWN = 20
"""The most values that a refusal of NaN and Inf names."""


class Observer:
    """A float32 graph in ONNX Runtime whose values can be looked at.

    Args:
        model: The graph; not changed, and its weights are not copied.
        names: Names of values of the main graph.
        limit: Bytes of values that are held at a time. A single value may be larger.

    Raises:
        IsthmusError: A name is unknown, or ONNX Runtime refuses the graph.
        MachineError: onnxruntime is not installed.
    """

    def __init__(self, model: ir.Model, names: Sequence[str], *, limit: int = LIMIT) -> None:
        graph = model.graph
        values = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs)) if v.name is not None}
        if missing := [name for name in names if name not in values]:
            raise IsthmusError(f"the graph has no values {', '.join(missing)}", hint="calibrate the model that is exported")
        self._shapes = {name: dims(values[name]) for name in names}
        self._inputs = {value.name or "": dims(value) or [] for value in graph.inputs}
        self._outputs = [value.name or "" for value in graph.outputs]
        self._limit = limit
        self._session = GraphSession(model, outputs=[name for name in names if name not in self._inputs])

    def run(self, inputs: Arrays) -> Arrays:
        """The graph's own outputs by name.

        Raises:
            IsthmusError: ONNX Runtime fails.
        """
        return self._session.run(inputs, self._outputs)

    def stream(self, sets: Sequence[Arrays], names: Sequence[str] | None = None) -> Iterator[tuple[int, str, np.ndarray[Any, Any]]]:
        """The values, one after the other: the index of the set of inputs, the value's name, and its numbers.

        Args:
            sets: Inputs by name, one call of the graph each.
            names: Which of the observer's values; by default all.

        Raises:
            IsthmusError: ONNX Runtime fails, or a value is NaN or infinite; all such values of a set are listed.
        """
        wanted = list(self._shapes if names is None else names)
        for index, inputs in enumerate(sets):
            yield from ((index, name, _finite({name: inputs[name]})[name]) for name in wanted if name in self._inputs)
            for group in self._groups([name for name in wanted if name not in self._inputs], inputs):
                found = dict(_finite(self._session.run(inputs, group)))
                for name in group:
                    yield index, name, found.pop(name)

    def observe(self, data: CalibrationData, *, tell: Callable[[int, str, Array], None] | None = None) -> dict[str, Observation]:
        """What every named value was over calibration data, by name in the order given.

        Args:
            data: The calibration data.
            tell: Is told of every value as it passes by: the index of the set of inputs, its name, and its numbers.

        Raises:
            IsthmusError: See `stream`.
        """
        found = dict.fromkeys(self._shapes, Observation())
        for index, name, array in self.stream(data.sets):
            times = data.times(index) if self._has_rows(name, data.timestep) else None
            found[name] = found[name].seen(array, times)
            if tell is not None:
                tell(index, name, array)
        return found

    def _has_rows(self, name: str, timestep: str) -> bool:
        """Whether the first axis of a value is that of the timestep: then its rows are samples."""
        rows, shape = self._inputs.get(timestep), self._shapes[name]
        return bool(rows) and bool(shape) and shape[0] is not None and rows[0] == shape[0]  # type: ignore[index]  # rows are numbers

    def _groups(self, names: Sequence[str], inputs: Arrays) -> Iterator[list[str]]:
        """Names whose values are held together; of a value whose size is not known it is assumed that it takes all."""
        sizes = {
            size: int(actual)
            for name, shape in self._inputs.items()
            for size, actual in zip(shape, inputs[name].shape, strict=False)
            if isinstance(size, str)
        }
        group: list[str] = []
        held = 0
        for name in names:
            shape = [evaluate(size, sizes) for size in self._shapes[name] or [None]]
            known = [size for size in shape if size is not None]
            needed = 4 * int(np.prod(known, dtype=np.int64)) if len(known) == len(shape) else self._limit
            if group and held + needed > self._limit:
                yield group
                group, held = [], 0
            group.append(name)
            held += needed
        if group:
            yield group


def check_graph(observer: Observer, inputs: CaseArrays, reference: CaseArrays) -> StageResult:
    """The stage `onnx` of a quantised artifact: the float32 graph that it is made from, in ONNX Runtime, over every case."""
    outputs = {case: observer.run(arrays) for case, arrays in inputs.items()}
    device = "CPUExecutionProvider, float32, before quantisation"
    return judge("onnx", compare_cases(reference, outputs), DEFAULT_TOLERANCES["fp32"], device=device)


def _finite(values: Mapping[str, np.ndarray[Any, Any]]) -> Mapping[str, np.ndarray[Any, Any]]:
    reasons = [
        Reason(f"its range is {array.min()} to {array.max()}", where=name)
        for name, array in values.items()
        # A sum would overflow; the smallest and the largest number are NaN where one is.
        if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max()))
    ]
    if reasons:
        shown = reasons[:_SHOWN]  # in the graph's order: the cause is at the front, and what follows from it may be all of the rest
        if more := len(reasons) - len(shown):
            shown.append(Reason(f"and {more} more values behind these"))
        raise IsthmusError("the model computes NaN or Inf on the calibration data", reasons=shown, hint="check the data")
    return values
