"""The whole range of what was seen: nothing saturates, and one outlier costs everything else its resolution."""

from __future__ import annotations

import numpy as np

from ...exporter.grids import Grid, Interval
from ..calibrator import Array, ChannelCalibrator, register_calibrator
from ..histogram import Histogram


@register_calibrator("max", summary="the largest |value| that was seen")
class Max(ChannelCalibrator):
    """From the smallest value to the largest, exactly."""

    def interval(self, seen: Histogram, grid: Grid) -> Interval:
        """See `Calibrator.interval`."""
        return grid.interval(seen.min, seen.max) if seen.counts.size else grid.interval(0.0, 0.0)

    def channels(self, weight: Array, axis: int, grid: Grid) -> Interval:
        """See `ChannelCalibrator.channels`."""
        others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
        return grid.interval(np.min(weight, axis=others), np.max(weight, axis=others))
