"""Where the marks of the report's charts lie."""

import math

import numpy as np
import pytest

from isthmus.calibration.charts import BOTTOM, TOP, Points, error_chart, saturated, spread, stage_chart
from isthmus.calibration.metrics import compare
from isthmus.exporter.manifest import StageResult
from isthmus.exporter.ranges import Bins, Bounds


def stage(name, verdict="verified", *errors):
    """A stage whose cases have these errors."""
    x = np.random.default_rng(0).standard_normal(1000)
    metrics = tuple(compare(x, x * (1 + e), case=f"case {i}", output="y") for i, e in enumerate(errors))
    return StageResult(name=name, verdict=verdict, metrics=metrics)


def test_a_stage_lies_at_its_worst_sqnr():
    """An error of 1 % in all places is an SQNR of 40 dB, one of 0.1 % of 60 dB."""
    chart = stage_chart([stage("onnx", "verified", 1e-3, 1e-2), stage("quantized", "failed", 0.1), stage("device", "not run")])
    measured, idle = (s.marks for s in chart.series)
    assert [(m.label, m.kind, m.open) for m in (*measured, *idle)] == [
        ("onnx", "verified", False), ("quantized", "failed", False), ("device", "not-run", True),
    ]  # fmt: skip
    at = {line.label: line.y for line in chart.lines}
    assert at["0 dB"] == idle[0].y == BOTTOM
    assert at["40 dB"] == pytest.approx(measured[0].y, abs=1e-9)
    assert at["20 dB"] == pytest.approx(measured[1].y, abs=1e-9)
    assert measured[0].x < measured[1].x < idle[0].x
    assert "onnx: verified\nworst SQNR 40.0 dB" in measured[0].tip
    assert "not run" in chart.title


def test_equal_outputs_lie_above_every_figure():
    chart = stage_chart([stage("torch", "verified", 0.0), stage("onnx", "verified", 1e-7), stage("quantized", "verified", 2.0)])
    torch, onnx, quantized = chart.series[0].marks
    assert torch.y == TOP < onnx.y
    assert quantized.y == BOTTOM, "an SQNR below 0 dB"
    assert {line.label: line.y for line in chart.lines}["equal"] == TOP
    assert stage_chart([stage("device", "not run")]) is None


def test_errors_lie_on_a_logarithmic_scale():
    values = [(0.0, 1e-6, "a"), (1.0, 1e-4, "b"), (2.0, 1e-2, "c"), (3.0, math.inf, "d")]
    chart = error_chart("t", [Points("total", "total", values), Points("injected", "injected", [])], bound=1e-3, across=str)
    (series,) = chart.series
    assert [m.tip for m in series.marks] == ["a", "b", "c", "d"]
    y = [m.y for m in series.marks]
    assert y[0] == BOTTOM
    assert y[1] - y[2] == pytest.approx(y[0] - y[1])
    assert y[2] == y[3] == TOP
    x = [m.x for m in series.marks]
    assert np.allclose(np.diff(x), x[1] - x[0])
    bound = next(line for line in chart.lines if line.kind == "bound")
    assert bound.y == pytest.approx((y[1] + y[2]) / 2)
    assert [label.label for label in chart.labels] == ["0.0", "1.5", "3.0"]
    assert len(list(series.segments)) == 3
    assert error_chart("t", [Points("total", "total", [])]) is None


@pytest.mark.parametrize("value", [1e-5, 1e-30, 1.0, 123.0, math.inf])
def test_a_single_error_has_a_place(value):
    chart = error_chart("t", [Points("total", "total", [(5.0, value, "")])])
    assert TOP <= chart.series[0].marks[0].y <= BOTTOM


def test_what_saturates_is_the_share_outside():
    """Against a histogram of numpy over the same numbers, of which whole bins lie outside."""
    numbers = np.random.default_rng(1).standard_normal(10_000)
    edges = np.arange(-20, 21) / 4
    bins = Bins(exponent=-2, first=-20, counts=tuple(np.histogram(numbers, edges)[0].tolist()))
    bounds = Bounds(low=-1.5, high=2.0)
    assert saturated(bins, bounds) == pytest.approx(((numbers < -1.5) | (numbers >= 2.0)).mean(), abs=1e-12)
    shown = spread(bins, bounds)
    assert (shown.width, shown.low, shown.high) == (40, 14.0, 28.0)
    drawn = [shown.inside.count("M"), shown.outside.count("M")]
    assert drawn[0] == 14
    assert sum(drawn) == sum(n > 0 for n in bins.counts)
    assert saturated(bins, Bounds(low=-5, high=5)) == 0.0
    assert spread(bins, None).outside == ""


def test_the_tallest_bar_is_whole_and_the_lowest_is_seen():
    path = spread(Bins(exponent=0, first=0, counts=(1, 0, 10**9)), None).inside
    assert "M2 1v-1.000" in path
    assert "M0 1v-0.06" in path
    assert "M1 " not in path
