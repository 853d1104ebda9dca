"""What is kept of the values that pass by: for each a histogram, and its range in each period of the timestep.

Both are merged without loss: what several processes observed on parts of the data equals what one observes on all of it, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .histogram import EMPTY, Histogram, exponent_of

Array = np.ndarray[Any, Any]

_BITS = 4
"""At most 16 periods on either side of 0."""

_SHORTEST = -20
"""The exponent of the shortest periods, which those of timesteps that are all 0 have."""


@dataclass(frozen=True)
class Periods:
    """Ranges by timestep, in periods that are `2 ** exponent` long: the shortest of which at most 16 reach to every timestep seen.

    Attributes:
        exponent: Of their length.
        found: For each period that was seen, floor(timestep / length): rows, smallest and largest value.
    """

    exponent: int | None = None
    found: Mapping[int, tuple[int, float, float]] = field(default_factory=dict)

    @staticmethod
    def of(times: Array, rows: Array) -> Periods:
        """The periods of one call.

        Args:
            times: (rows,) timesteps, finite.
            rows: (rows, …) values, finite, at least one a row.
        """
        exponent = exponent_of(float(times.min()), float(times.max()), _BITS, smallest=_SHORTEST)
        flat = rows.reshape(len(rows), -1)
        single = [
            (math.floor(math.ldexp(float(time), -exponent)), (1, float(low) + 0.0, float(high) + 0.0))
            for time, low, high in zip(times, flat.min(axis=1), flat.max(axis=1), strict=True)
        ]
        return Periods(exponent, _combined(single))

    def merge(self, other: Periods) -> Periods:
        """The periods of both. Associative and commutative."""
        if self.exponent is None or other.exponent is None:
            return self if other.exponent is None else other
        if self.exponent == other.exponent:
            return Periods(self.exponent, _joined(self.found, other.found))
        exponent = max(self.exponent, other.exponent)
        parts = [
            (index >> (exponent - p.exponent), entry) for p in (self, other) if p.exponent is not None for index, entry in p.found.items()
        ]
        return Periods(exponent, _combined(parts))


def _joined(a: Mapping[int, tuple[int, float, float]], b: Mapping[int, tuple[int, float, float]]) -> dict[int, tuple[int, float, float]]:
    found = dict(a)
    for index, entry in b.items():
        before = found.get(index)
        found[index] = entry if before is None else (before[0] + entry[0], min(before[1], entry[1]), max(before[2], entry[2]))
    return found


def _combined(entries: list[tuple[int, tuple[int, float, float]]]) -> dict[int, tuple[int, float, float]]:
    found: dict[int, tuple[int, float, float]] = {}
    for index, (rows, low, high) in sorted(entries, key=lambda entry: entry[0]):
        before = found.get(index, (0, math.inf, -math.inf))
        found[index] = (before[0] + rows, min(before[1], low), max(before[2], high))
    return found


@dataclass(frozen=True)
class Observation:
    """What was seen of one value.

    Attributes:
        histogram: Of its numbers.
        periods: By timestep; empty where there is none, or rows are no samples.
    """

    histogram: Histogram = field(default_factory=lambda: EMPTY)
    periods: Periods = field(default_factory=Periods)

    @staticmethod
    def of(values: Array, times: Array | None = None) -> Observation:
        """What one call shows.

        Args:
            values: Finite numbers, any shape; with `times` a row a sample.
            times: (rows,) the timestep of each row.
        """
        return Observation(Histogram.of(values), Periods.of(times, values) if times is not None and values.size else Periods())

    def seen(self, values: Array, times: Array | None = None) -> Observation:
        """What this and one more call show: as `merge` with `of`, to the last bit, and in less time."""
        periods = Periods.of(times, values) if times is not None and values.size else Periods()
        return Observation(self.histogram.merge(Histogram.of(values, coarser=self.histogram.exponent)), self.periods.merge(periods))

    def merge(self, other: Observation) -> Observation:
        """What both show. Associative and commutative, to the last bit."""
        return Observation(self.histogram.merge(other.histogram), self.periods.merge(other.periods))


Observations = Mapping[str, Observation]
"""What was seen of every value, by name."""


def merged(a: Observations, b: Observations) -> Observations:
    """What two parts of the data show; a value may be in one alone."""
    return {name: a.get(name, Observation()).merge(b.get(name, Observation())) for name in {**a, **b}}
