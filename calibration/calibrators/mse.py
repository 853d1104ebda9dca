"""The interval of the least mean squared error: what saturation costs is weighed against what rounding costs.

Sung, Shin and Hwang, "Resiliency of deep neural networks under quantization", arXiv:1511.06488, section 3, for uniform grids; the same
criterion holds for floating-point grids (Kuzmin et al., "FP8 quantization: the power of the exponent", arXiv:2208.09225, section 4).
"""

from __future__ import annotations

import numpy as np

from ...exporter.grids import Grid, Interval, Parameters
from ..calibrator import Array, ChannelCalibrator, register_calibrator
from ..histogram import Histogram
from ..search import HALVINGS, STEPS, narrowest


@register_calibrator("mse", summary="the least mean squared error of rounding and saturation")
class MeanSquaredError(ChannelCalibrator):
    """Searches for the interval whose error is least: of a tensor's histogram, of a weight's own numbers."""

    def interval(self, seen: Histogram, grid: Grid) -> Interval:
        """See `Calibrator.interval`."""
        if not seen.counts.size:
            return grid.interval(0.0, 0.0)
        return narrowest(grid.interval(seen.min, seen.max), grid, Errors(seen, grid).of)

    def channels(self, weight: Array, axis: int, grid: Grid) -> Interval:
        """See `ChannelCalibrator.channels`. Both ends of an interval are cut by the same factor."""
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)
        whole = grid.interval(rows.min(axis=1), rows.max(axis=1))
        best, least = whole, np.full(len(rows), np.inf)
        # Weights have no outliers of 1/128: fewer halvings do, and a weight is read as often as there are candidates.
        for step in range(STEPS * min(HALVINGS, 3) + 1):
            tried = Interval(whole.low * 2.0 ** (-step / STEPS), whole.high * 2.0 ** (-step / STEPS))
            scale, zero = grid.parameters(tried)
            error = grid.read(rows, Parameters(scale[:, None], zero[:, None])) - rows
            squares = np.einsum("ij,ij->i", error, error)
            better = squares < least
            least = np.where(better, squares, least)
            best = Interval(np.where(better, tried.low, best.low), np.where(better, tried.high, best.high))
        return best


class Errors:
    """The squared errors of a histogram's numbers on a grid, for many intervals at once.

    Two numbers stand for those of a bin. What is stored as one code lies between the middles to its neighbours, and its error follows from
    how many numbers there are and from their sum: two differences of running sums for a code, however many bins there are.

    Args:
        seen: The numbers; at least one.
        grid: What they are stored on.
    """

    def __init__(self, seen: Histogram, grid: Grid) -> None:
        self._grid, self._values = grid, grid.values()
        self._edges, self._gaps = (self._values[1:] + self._values[:-1]) / 2, np.diff(self._values)
        self._half = seen.width / 2
        self._first = 2 * seen.first
        counts = np.repeat(seen.counts / 2, 2)
        points = np.clip((self._first + np.arange(counts.size) + 0.5) * self._half, seen.min, seen.max)
        self._counts = np.concatenate(([0.0], np.cumsum(counts)))
        self._sums = np.concatenate(([0.0], np.cumsum(counts * points)))
        self._squares = float(np.dot(counts, points * points))

    def of(self, intervals: Interval) -> Array:
        """(candidates,) the summed squared errors of (candidates,) intervals."""
        scale, zero = self._grid.parameters(intervals)
        edges = (self._edges - zero[:, None]) * scale[:, None]
        # The first point that is not below an edge; on it both codes are equally far.
        after = edges / self._half
        after -= self._first + 0.5
        np.ceil(after, out=after)
        index = np.clip(after, 0, self._counts.size - 1, out=after).astype(np.intp)
        # Each number as if it were the last code, less what it gains at every edge that it lies below.
        gained = edges
        gained *= self._counts[index]
        gained -= self._sums[index]
        last = (self._values[-1] - zero) * scale
        whole = self._squares + last * (last * self._counts[-1] - 2 * self._sums[-1])
        return np.asarray(whole - 2 * scale * (gained @ self._gaps))
