"""Makes the calibration table of what was observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..exporter.grids import GRIDS
from ..exporter.manifest import Column, Table
from ..exporter.ranges import Bins, Bounds, CalibrationTable, DataInfo, Observed, Period
from .calibrator import CALIBRATORS, Calibrator
from .data import CalibrationData
from .observation import Observation, Observations, Periods

PERCENTS = (50.0, 90.0, 99.0, 99.9, 99.99)
"""The percentiles of |numbers| that the table holds."""

SUMMARY_BINS = 64
"""The most bins of the table's histograms."""


def calibration_table(
    observations: Observations,
    data: CalibrationData,
    *,
    method: str,
    grids: Sequence[str],
    model: str = "",
    weights: str = "",
    seed: int = 0,
    modules: Mapping[str, str] | None = None,
) -> CalibrationTable:
    """The table.

    Args:
        observations: What was seen of every value.
        data: On what.
        method: A registered calibrator.
        grids: Names of the grids to choose ranges for.
        model: The model's name.
        weights: sha256 of its weights.
        seed: Of what was drawn.
        modules: The PyTorch module that reads each value.

    Raises:
        UnknownNameError: There is no such calibrator.
    """
    calibrator = CALIBRATORS[method]()
    return CalibrationTable(
        model=model,
        weights=weights,
        method=method,
        seed=seed,
        data=DataInfo(source=data.source, sets=len(data.sets), rows=data.rows, sha256=data.sha256()),
        timestep=data.timestep,
        values={name: _observed(seen, calibrator, grids, (modules or {}).get(name, "")) for name, seen in observations.items()},
    )


def report_table(table: CalibrationTable) -> Table:
    """What was seen of every value and what is represented of it, as a table of the report."""
    grids = list(dict.fromkeys(grid for seen in table.values.values() for grid in seen.ranges))
    rows = []
    for name, seen in table.values.items():
        bounds = [seen.ranges.get(grid) for grid in grids]
        drawn = [f"{b.low:.4g} to {b.high:.4g}" if b is not None else None for b in bounds]
        rows.append((seen.module, name, seen.min, seen.max, seen.percentiles.get("99.9"), *drawn, seen.drift))
    lead = "What the calibration data showed of the activations that are quantised, and what is represented; the rest saturates."
    drift = " The drift is the largest |value| of a period of the trajectory over the smallest: one scale serves all timesteps."
    return Table(
        name="calibration",
        title="Ranges of activations",
        lead=lead + (drift if table.timestep else ""),
        columns=(
            Column(name="PyTorch module", kind="code"),
            Column(name="Value", kind="code"),
            Column(name="Smallest", kind="number"),
            Column(name="Largest", kind="number"),
            Column(name="99.9 % of |value|", kind="number"),
            *(Column(name=f"Represented in {grid}") for grid in grids),
            Column(name="Drift", kind="number"),
        ),
        rows=tuple(rows),
    )


def _observed(seen: Observation, calibrator: Calibrator, grids: Sequence[str], module: str) -> Observed:
    histogram = seen.histogram
    empty = not histogram.counts.size
    ranges = {}
    for name in grids:
        low, high = calibrator.interval(histogram, GRIDS[name])
        ranges[name] = Bounds(low=float(low) + 0.0, high=float(high) + 0.0)  # -0.0 becomes 0.0
    few = histogram.summary(SUMMARY_BINS)
    periods = _periods(seen.periods)
    sizes = [size for period in periods if (size := period.amax) > 0]
    return Observed(
        module=module,
        count=histogram.count,
        min=0.0 if empty else histogram.min + 0.0,
        max=0.0 if empty else histogram.max + 0.0,
        percentiles={f"{percent:g}": histogram.quantile(percent / 100) for percent in PERCENTS},
        histogram=None if empty else Bins(exponent=few.exponent, first=few.first, counts=tuple(few.counts.tolist())),
        ranges=ranges,
        periods=periods,
        drift=max(sizes) / min(sizes) if sizes else None,
    )


def _periods(periods: Periods) -> tuple[Period, ...]:
    if periods.exponent is None:
        return ()
    length = 2.0**periods.exponent
    return tuple(
        Period(start=index * length, stop=(index + 1) * length, rows=rows, min=low, max=high)
        for index, (rows, low, high) in sorted(periods.found.items())
    )
