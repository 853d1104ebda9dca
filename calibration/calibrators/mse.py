"""The interval of the least mean squared error: what saturation costs is weighed against what rounding costs.

Sung, Shin and Hwang, "Resiliency of deep neural networks under quantization", arXiv:1511.06488, section 3, for uniform grids; the same
criterion holds for floating-point grids (Kuzmin et al., "FP8 quantization: the power of the exponent", arXiv:2208.09225, section 4).
"""

from __future__ import annotations

import numpy as np

from ...exporter.grids import Grid, Interval, Parameters
from ..calibrator import Array, Calibrator, register_calibrator
from ..histogram import Histogram
from ..search import HALVINGS, STEPS, narrowest


@register_calibrator("mse", summary="the least mean squared error of rounding and saturation")
class MeanSquaredError(Calibrator):
    """Searches for the interval whose error is least: of a tensor's histogram, of a weight's own numbers."""

    def interval(self, seen: Histogram, grid: Grid) -> Interval:
        """See `Calibrator.interval`."""
        if not seen.counts.size:
            return grid.interval(0.0, 0.0)
        points, weights = seen.points()

        def cost(interval: Interval) -> float:
            error = grid.read(points, grid.parameters(interval)) - points
            return float(np.dot(weights, error * error))

        return narrowest(grid.interval(seen.min, seen.max), grid, cost)

    def channels(self, weight: Array, axis: int, grid: Grid) -> Interval:
        """See `Calibrator.channels`. Both ends of an interval are cut by the same factor."""
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
