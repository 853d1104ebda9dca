"""The interval whose quantised distribution tells the most of the true one: the least Kullback-Leibler divergence.

Migacz, "8-bit inference with TensorRT" (GTC 2017, slides 30 to 38). There the cells of the grid are equally wide; here they are those of
any grid, so that the same criterion serves E4M3, whose cells are finer near 0.
"""

from __future__ import annotations

import math

import numpy as np

from ...exporter.grids import Grid, Interval
from ..calibrator import Array, Calibrator, register_calibrator
from ..histogram import Counts, Histogram
from ..search import narrowest

FEWEST = 128
"""Bins on either side of 0 that an interval has at least: as many as 8 bits have codes there. Fewer are stored without any loss, and where
most numbers lie in one bin, that bin alone would win."""


@register_calibrator("entropy", summary="the least Kullback-Leibler divergence of the quantised distribution")
class Entropy(Calibrator):
    """Searches the bin edges for those whose divergence is least."""

    def interval(self, seen: Histogram, grid: Grid) -> Interval:
        """See `Calibrator.interval`."""
        if not seen.counts.size or seen.amax == 0:
            return grid.interval(0.0, 0.0)
        whole = grid.interval(seen.min, seen.max)
        seen = seen.coarsened(seen.exponent + 1)  # at most 2048 bins on either side, as in the slides
        low, high = _symmetric(seen, grid) if grid.symmetric else _asymmetric(seen, grid, whole)
        return grid.interval(max(low * seen.width, whole.low), min(high * seen.width, whole.high))


def _symmetric(seen: Histogram, grid: Grid) -> tuple[int, int]:
    distribution = Distribution(seen, grid)
    # The widest of several: nothing is cut off without need.
    edge = min(range(distribution.stop, FEWEST - 1, -1), key=lambda edge: distribution.divergence(-edge, edge))
    return -edge, edge


def _asymmetric(seen: Histogram, grid: Grid, whole: Interval) -> tuple[int, int]:
    distribution = Distribution(seen, grid)

    def edges(interval: Interval) -> tuple[int, int]:
        return math.floor(interval.low / seen.width), math.floor(interval.high / seen.width) + 1

    def cost(interval: Interval) -> float:
        low, high = edges(interval)
        return distribution.divergence(low, high) if high - low >= 2 * FEWEST else math.inf

    def costs(intervals: Interval) -> Array:
        return np.array([cost(Interval(low, high)) for low, high in zip(intervals.low, intervals.high, strict=True)])

    return edges(narrowest(whole, grid, costs))


class Distribution:
    """The bins that hold anything; on symmetric grids those of |number|.

    Args:
        seen: The values.
        grid: What they are stored on.

    Attributes:
        stop: The index behind the last bin.
    """

    def __init__(self, seen: Histogram, grid: Grid) -> None:
        counts, first = (seen.magnitudes(), 0) if grid.symmetric else (seen.counts, seen.first)
        held = np.flatnonzero(counts)
        self._bins, self._counts = first + held, counts[held]
        self._width, self._grid = seen.width, grid
        self.stop = int(self._bins[-1]) + 1

    def divergence(self, low: int, high: int) -> float:
        """The Kullback-Leibler divergence, in nats, of the distribution on the grid from the one that was seen.

        Both are over the bins of an interval. What lies beyond counts in the outermost of them that hold anything, of the true distribution
        alone. The counts of bins that are stored as the same code are shared out among those of them that hold anything.

        Args:
            low: The index of the first bin; on symmetric grids `-high`.
            high: The index behind the last.

        Returns:
            inf where nothing lies between.
        """
        first = 0 if self._grid.symmetric else low
        start, stop = int(np.searchsorted(self._bins, first)), int(np.searchsorted(self._bins, high))
        below, above = int(self._counts[:start].sum()), int(self._counts[stop:].sum())
        if start == stop:
            return math.inf
        inside = self._counts[start:stop]
        true: Counts = inside.copy()
        true[0] += below
        true[-1] += above
        centres = (self._bins[start:stop] + 0.5) * self._width
        codes = self._grid.codes(centres, self._grid.parameters(self._grid.interval(low * self._width, high * self._width)))
        cells = np.flatnonzero(np.diff(codes, prepend=np.nan))
        sizes = np.diff(cells, append=codes.size)
        stored = np.repeat(np.add.reduceat(inside, cells) / sizes, sizes)
        p, q = true / true.sum(), stored / stored.sum()
        return float(np.dot(p, np.log(p / q)))
