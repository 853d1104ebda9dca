"""A share of what was seen: the rarest values saturate, so that outliers do not set the scale (Wu et al., arXiv:2004.09602, 3.2)."""

from __future__ import annotations

from ...exporter.grids import Grid, Interval
from ..calibrator import Calibrator, register_calibrator
from ..histogram import Histogram


@register_calibrator("percentile", summary="what 99.99 % of all |values| do not exceed")
class Percentile(Calibrator):
    """The smallest bin edge that a share of the values does not exceed; on asymmetric grids half of the rest may lie beyond either end.

    Args:
        percent: Of the values, above 0 to 100. 99.99 is the largest of the values that the paper tries, and loses the least.
    """

    def __init__(self, percent: float = 99.99) -> None:
        if not 0 < percent <= 100:
            raise ValueError(f"percent must be above 0 and at most 100, got {percent}")
        self.percent = percent

    def interval(self, seen: Histogram, grid: Grid) -> Interval:
        """See `Calibrator.interval`."""
        if grid.symmetric:
            return grid.interval(0.0, seen.quantile(self.percent / 100))
        return grid.interval(*seen.tails((100 - self.percent) / 200))
