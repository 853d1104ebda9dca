"""The calibration table: what it says of what was seen, and the file that it is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from isthmus.calibration.calibrator import CALIBRATORS
from isthmus.calibration.data import CalibrationData
from isthmus.calibration.observation import Observation
from isthmus.calibration.table import PERCENTS, calibration_table
from isthmus.exporter.errors import IntegrityError, IsthmusError, UnknownNameError
from isthmus.exporter.grids import GRIDS
from isthmus.exporter.ranges import CalibrationTable, read_table


def values(seed=0, scale=1.0):
    return (np.random.Generator(np.random.PCG64(seed)).standard_normal((8, 500)) * scale).astype(np.float32)


TIMES = np.float32([1000, 900, 700, 500, 300, 200, 100, 0])
GROWING = values() * (1 + TIMES[:, None] / 100).astype(np.float32)


@pytest.fixture(scope="module")
def table():
    data = CalibrationData("trajectories", [{"x": GROWING, "t": TIMES}], "t")
    seen = {
        "a": Observation.of(GROWING, TIMES),
        "b": Observation.of(values(1) - 3),
        "zeros": Observation.of(np.zeros((2, 2), np.float32)),
        "nothing": Observation(),
    }
    return calibration_table(
        seen, data, method="percentile", grids=("e4m3", "int8", "uint8"), model="net", weights="ab", seed=3, modules={"a": "blocks.0"}
    )


def test_what_was_seen_is_told(table):
    a = table.values["a"]
    assert (a.module, a.count, a.min, a.max) == ("blocks.0", GROWING.size, float(GROWING.min()), float(GROWING.max()))
    assert a.amax == float(np.abs(GROWING).max())
    assert sum(a.histogram.counts) == a.count
    width = 2.0**a.histogram.exponent
    assert a.histogram.first * width <= a.min < (a.histogram.first + 1) * width
    assert list(a.percentiles) == [f"{p:g}" for p in PERCENTS]
    for percent, value in a.percentiles.items():
        assert value == pytest.approx(np.percentile(np.abs(GROWING), float(percent)), rel=0.05)
    assert (table.model, table.weights, table.seed, table.timestep) == ("net", "ab", 3, "t")
    assert table.summary() == {"method": "percentile", "source": "trajectories", "size": 1, "rows": 8, "sha256": table.data.sha256}
    assert not table.random


def test_ranges_are_those_of_the_calibrator(table):
    calibrator = CALIBRATORS["percentile"]()
    seen = Observation.of(GROWING).histogram
    for grid in ("e4m3", "int8", "uint8"):
        assert table.interval("a", grid) == calibrator.interval(seen, GRIDS[grid])
    assert table.ranges("e4m3")["a"] == calibrator.interval(seen, GRIDS["e4m3"]).high
    assert table.ranges("uint8") == {}  # has no largest |value| that would do
    low, high = table.interval("b", "uint8")
    assert low < -4
    assert high < 1
    assert table.interval("zeros", "int8") == table.interval("nothing", "int8") == (0, 0)


def test_the_drift_is_the_ratio_of_the_periods(table):
    periods = table.values["a"].periods
    assert [p.rows for p in periods] == [1] * 8
    for period, index in zip(periods, np.argsort(TIMES), strict=True):
        assert period.start <= TIMES[index] < period.stop
        assert (period.min, period.max) == (float(GROWING[index].min()), float(GROWING[index].max()))
    peaks = np.abs(GROWING).max(axis=1)
    assert table.values["a"].drift == float(peaks.max()) / float(peaks.min()) > 5
    assert table.values["b"].drift is None


def test_the_file_is_read_back_and_is_the_same_every_time(table, tmp_path):
    text = table.json_text()
    path = tmp_path / "calibration.json"
    path.write_text(text)
    assert read_table(path) == table
    assert read_table(path).json_text() == text
    assert len(text.splitlines()) == len(table.values) + 2
    assert json.loads(text)["schema"] == 1
    assert "-0.0" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace('"schema": 1', '"schema": 2'), "schema"),
        (lambda t: t.replace('"method": "percentile"', '"method": 3'), "method"),
        (lambda t: t.replace('"count": 4000', '"count": -1'), "count"),
        (lambda t: t.replace('"seed": 3', '"seed": NaN'), "is no calibration table"),
        (lambda t: t.replace('"seed": 3', '"seed": 3, "more": 1'), "more"),
        (lambda t: t[:100], "is no calibration table"),
        (lambda _: "", "is no calibration table"),
    ],
)
def test_another_file_is_refused(table, tmp_path, change, message):
    path = tmp_path / "calibration.json"
    changed = change(table.json_text())
    assert changed != table.json_text()
    path.write_text(changed)
    with pytest.raises(IntegrityError, match=message):
        read_table(path)
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_table(tmp_path / "none.json")


def test_ranges_alone_make_a_table():
    table = CalibrationTable.of_ranges({"x": 4.0})
    assert table.ranges("e4m3") == {"x": 4.0}
    assert table.interval("x", "e4m3") == (-4, 4)
    with pytest.raises(IsthmusError, match="no range of x for int8"):
        table.interval("x", "int8")
    with pytest.raises(IsthmusError, match="no range of y for e4m3"):
        table.interval("y", "e4m3")


def test_what_an_export_lacks_is_listed(table):
    table.require(["a", "b"], ["e4m3", "int8"])
    with pytest.raises(IsthmusError, match="another model") as caught:
        table.require(["a", "q", "r"], ["e4m3", "int4"])
    assert {(r.where, r.what) for r in caught.value.reasons} == {
        ("q", "is not in the table"),
        ("r", "is not in the table"),
        ("a", "has no range for int4, only for e4m3, int8, uint8"),
    }


def test_an_unknown_method_is_refused():
    with pytest.raises(UnknownNameError, match="calibration method 'best'"):
        calibration_table({}, CalibrationData("here", []), method="best", grids=("int8",))
