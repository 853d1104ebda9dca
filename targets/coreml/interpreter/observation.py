"""What the values of a program are while it runs: their ranges, for calibration and for the head room of float16."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .machine import Interpreter
from .program import operations_in
from .registry import Array, tensor

LARGEST = 65504.0
"""float16's largest number."""


@dataclass(frozen=True)
class Observed:
    """The range of one value over all samples.

    Attributes:
        operation: The MIL type of the operation that computes it; `input` for the program's inputs, and for what a loop carries.
        dtype: `float16` or `float32`.
        shape: As it was last.
        low: The smallest number; NaN when the value was not a number anywhere.
        high: The largest number; the same.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float

    @property
    def peak(self) -> float:
        """The largest magnitude; NaN when the value was not a number anywhere."""
        return max(abs(self.low), abs(self.high)) if not math.isnan(self.low) else math.nan

    @property
    def head_room(self) -> float:
        """How many times larger it could become in float16; below 1 it overflows there, whatever its dtype is here."""
        return LARGEST / self.peak if self.peak else math.inf


def observe(program: Any, samples: Iterable[Mapping[str, Array]], function: str | None = None) -> dict[str, Observed]:
    """Runs the program on the samples, from states of zero, and keeps the range of every floating-point value.

    Args:
        program: What `load` returns.
        samples: The inputs of each run.
        function: The program's function; its default one when None.

    Returns:
        The ranges by the names of the values, in the order of the program.

    Raises:
        UsageError, UnsupportedError, IsthmusError: See `Interpreter`.
    """
    interpreter = Interpreter(program, function)
    kinds = {v.name: op.op_type for op in operations_in(program.functions[interpreter.function]) for v in op.outputs}
    ranges: dict[str, Observed] = {}

    def watch(name: str, value: Array) -> None:
        if value.dtype.kind != "f" or not value.size:
            return
        low, high = _range(value)
        before = ranges.get(name)
        if before is not None:
            low, high = float(np.minimum(low, before.low)), float(np.maximum(high, before.high))  # of NaN, NaN
        ranges[name] = Observed(kinds.get(name, "input"), str(value.dtype), value.shape, low, high)

    for sample in samples:
        interpreter.run(sample, watch=watch)
    return ranges


def _range(value: Array) -> tuple[float, float]:
    found = tensor(value).aminmax()
    return found.min.item(), found.max.item()


def peaks(observed: Mapping[str, Observed]) -> list[tuple[str, Observed]]:
    """The table of what was observed, from the largest magnitude to the smallest; what was not a number comes first."""
    return sorted(observed.items(), key=lambda item: (-math.inf if math.isnan(item[1].peak) else -item[1].peak, item[0]))
