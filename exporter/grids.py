"""The numbers that a quantised tensor can hold, and the scale and zero point that bring a range of values onto them.

A value x is stored as a code q = round(x / scale) + zero_point, clipped to the grid, and read back as (q - zero_point) * scale
(ONNX, QuantizeLinear and DequantizeLinear).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from .errors import IsthmusError

Array = np.ndarray[Any, Any]
WeightGrid = Literal["int8", "e4m3", "int4"]
Float64 = np.ndarray[Any, np.dtype[np.float64]]

SMALLEST_SCALE = 2.0**-126
"""The smallest scale, float32's smallest normal number: below it a scale would lose its bits, or be 0."""


class Interval(NamedTuple):
    """The values that a quantised tensor has to hold; what lies outside saturates. Numbers, or arrays of them, float64.

    Attributes:
        low: The smallest, at most 0.
        high: The largest, at least 0.
    """

    low: Any
    high: Any

    @property
    def amax(self) -> Any:
        """The largest |value|."""
        return np.maximum(-self.low, self.high)


class Parameters(NamedTuple):
    """How an interval is mapped onto a grid. Numbers, or arrays of them.

    Attributes:
        scale: Above 0 and finite, float64.
        zero_point: The code of 0; 0 for symmetric grids.
    """

    scale: Any
    zero_point: Any


def scale_of_each(scale: Array, inputs: int) -> Float64:
    """(outputs, inputs), the scale of each number of a weight.

    Args:
        scale: (outputs,), or (outputs, groups) where so many groups of neighbouring inputs have a scale of their own.
        inputs: A multiple of the groups.
    """
    rows = scale.astype(np.float64).reshape(len(scale), -1)
    return np.repeat(rows, inputs // rows.shape[1], axis=1)


@dataclass(frozen=True)
class RoundedWeight:
    """The codes of a layer's weight, when they are not those that are nearest on the scales of its largest values.

    Attributes:
        codes: (outputs, inputs), in a type that holds the codes.
        scale: (outputs,) float; or (outputs, groups), where each of so many groups of neighbouring inputs has a scale of its own.
        how: The way that they were found, for people.
    """

    codes: Array
    scale: Array
    how: str = "rounded by GPTQ"

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """Refuses codes of another weight.

        Raises:
            IsthmusError: The shapes are not those of a weight with so many channels.
        """
        groups = self.scale.shape[1] if self.scale.ndim == 2 else 0
        expected = (outputs, groups) if groups and inputs % groups == 0 else (outputs,)
        if self.codes.shape != (outputs, inputs) or self.scale.shape != expected:
            what = f"codes {self.codes.shape} with scales {self.scale.shape}"
            raise IsthmusError(f"the rounded weight {name} has {what}, expected ({outputs}, {inputs}) with ({outputs},)")

    def read(self) -> Float64:
        """(outputs, inputs), what is read back."""
        return self.codes.astype(np.float64) * scale_of_each(self.scale, self.codes.shape[1])


@dataclass(frozen=True)
class Grid:
    """The codes of a quantised type.

    Attributes:
        name: What it is called in calibration tables.
        low: The smallest code.
        high: The largest code.
        symmetric: Whether 0 is always stored as the code 0, so that intervals reach as far below it as above.
        floating: Whether the codes are those of an 8-bit float (E4M3: 1 sign, 4 exponent and 3 mantissa bits) instead of all integers.
    """

    name: str
    low: float
    high: float
    symmetric: bool = True
    floating: bool = False

    def values(self) -> Float64:
        """Every code, rising, float64."""
        if not self.floating:
            return np.arange(self.low, self.high + 1, dtype=np.float64)
        found = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return np.unique(found[np.isfinite(found)])

    def interval(self, low: Any, high: Any) -> Interval:
        """The interval that this grid can represent and that holds both bounds: it holds 0, and is symmetric where the grid is."""
        low, high = np.minimum(np.asarray(low, np.float64), 0.0), np.maximum(np.asarray(high, np.float64), 0.0)
        if self.symmetric:
            high = np.maximum(-low, high)
            low = -high
        return Interval(low[()], high[()])

    def parameters(self, interval: Interval) -> Parameters:
        """The scale and zero point of an interval, or of an array of them. Where it is [0, 0], any scale will do: it is 1."""
        low, high = np.asarray(interval.low, np.float64), np.asarray(interval.high, np.float64)
        width = high if self.symmetric else high - low
        span = self.high if self.symmetric else self.high - self.low
        scale = np.where(width > 0, np.maximum(width / span, SMALLEST_SCALE), 1.0)
        if self.symmetric:
            return Parameters(scale[()], np.zeros_like(scale)[()])
        return Parameters(scale[()], np.clip(np.rint(self.low - low / scale), self.low, self.high)[()])

    def codes(self, values: Array, parameters: Parameters) -> Float64:
        """The codes of values, to nearest, ties to even, saturating. Scale and zero point broadcast against the values."""
        scaled = np.asarray(values, np.float64) / parameters.scale
        if self.floating:
            # numpy's cast gives NaN beyond the largest number (ml_dtypes 0.6).
            return np.asarray(np.clip(scaled, self.low, self.high).astype(np.float32).astype(ml_dtypes.float8_e4m3fn), np.float64)
        return np.asarray(np.clip(np.rint(scaled) + parameters.zero_point, self.low, self.high))

    def read(self, values: Array, parameters: Parameters) -> Float64:
        """What is read back of values that were stored on the grid, float64."""
        return np.asarray((self.codes(values, parameters) - parameters.zero_point) * parameters.scale, np.float64)


GRIDS: Mapping[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("e4m3", -448, 448, floating=True),
        # -128 is left out, so that a weight and its negative are equally far from their codes.
        Grid("int8", -127, 127),
        Grid("uint8", 0, 255, symmetric=False),
        Grid("int4", -7, 7),
    )
}
"""Every grid by name: `e4m3` and `int8` for activations and weights, `uint8` for activations, `int4` for weights."""

ACTIVATION_GRIDS: Mapping[str, tuple[str, ...]] = {"fp8": ("e4m3",), "int8": ("uint8", "int8"), "w8a8": ("int8",)}
"""The grids that activations are stored on, by precision."""

WEIGHT_GRIDS: Mapping[str, WeightGrid] = {"fp8": "e4m3", "int8": "int8", "w8a8": "int8", "int4": "int4"}
"""The grid that weights are stored on, by precision."""
