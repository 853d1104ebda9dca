"""Every registered calibrator on every grid, against what brute force over the numbers themselves finds."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from isthmus.calibration.calibrator import CALIBRATORS, channel_calibrators
from isthmus.calibration.calibrators.entropy import Distribution
from isthmus.calibration.calibrators.percentile import Percentile
from isthmus.calibration.histogram import EMPTY, Histogram
from isthmus.exporter.errors import UnknownNameError
from isthmus.exporter.grids import GRIDS, SMALLEST_SCALE, Grid, Interval, Parameters

METHODS = sorted(CALIBRATORS)


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def _outliers():
    values = rng(1).standard_normal(20_000)
    values[:2] = (60.0, -80.0)
    return values


def _gelu():
    x = rng(5).standard_normal(20_000) * 2
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


DATA = {
    "normal": rng(0).standard_normal(20_000),
    "outliers": _outliers(),
    "one side": np.abs(rng(2).standard_normal(20_000)) ** 2,
    "off centre": rng(3).normal(2.0, 0.5, 20_000),
    "negative": -rng(4).exponential(1.0, 20_000),
    "gelu": _gelu(),
    "constant": np.full(1000, 0.37),
    "negative constant": np.full(1000, -3.0),
    "zeros": np.zeros(1000),
    "mostly zeros": np.where(rng(6).random(20_000) < 0.98, 0, rng(7).standard_normal(20_000)),
    "one number": np.array([5.0]),
    "tiny": rng(8).standard_normal(1000) * 1e-42,
    "huge": rng(9).standard_normal(1000) * 1e37,
}
DATA = {name: values.astype(np.float32) for name, values in DATA.items()}


def error(values, interval, grid):
    """Mean squared error of rounding to the grid, written down once more: float64, from the definitions of ONNX."""
    x = values.astype(np.float64)
    if grid == "e4m3":
        scale = interval.high / 448
        mantissa, exponent = np.frexp(np.minimum(np.abs(x) / scale, 448))
        step = np.exp2(np.maximum(exponent - 1, -6) - 3.0)
        return float(np.mean((np.sign(x) * np.rint(np.ldexp(mantissa, exponent) / step) * step * scale - x) ** 2))
    low, high = {"int8": (-127, 127), "int4": (-7, 7), "uint8": (0, 255)}[grid]
    scale = interval.high / high if grid != "uint8" else (interval.high - interval.low) / 255
    zero = 0 if grid != "uint8" else round(-interval.low / scale)
    return float(np.mean(((np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale - x) ** 2))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("method", METHODS)
def test_every_interval_can_be_used(method, name, grid):
    values = DATA[name]
    low, high = CALIBRATORS[method]().interval(Histogram.of(values), GRIDS[grid])
    scale, zero = GRIDS[grid].parameters(Interval(low, high))
    assert np.isfinite(scale)
    assert np.float32(scale) > 0
    assert low <= 0 <= high
    peak = float(np.abs(values).max())
    assert max(-low, high) <= peak
    if GRIDS[grid].symmetric:
        assert low == -high
        assert zero == 0
    else:
        assert min(float(values.min()), 0) <= low
        assert high <= max(float(values.max()), 0)
        assert 0 <= zero <= 255
    if peak == 0:
        assert (low, high, scale) == (0, 0, 1)
    if "constant" in name and method != "percentile":  # which rounds to a bin's edge
        np.testing.assert_allclose(GRIDS[grid].read(values[:1], GRIDS[grid].parameters(Interval(low, high))), values[:1], rtol=1e-2)
    assert np.isfinite(GRIDS[grid].read(values, GRIDS[grid].parameters(Interval(low, high)))).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_seen_is_like_zeros(method, grid):
    assert CALIBRATORS[method]().interval(EMPTY, GRIDS[grid]) == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_max_is_set_by_outliers(method):
    values = DATA["outliers"]
    chosen = CALIBRATORS[method]().interval(Histogram.of(values), GRIDS["int8"])
    if method == "max":
        assert chosen == (-80.0, 80.0)
        return
    assert chosen.high < (80 if method == "mse" else 10)  # the error weighs what saturates, the others count it
    if method == "mse":
        assert error(values, chosen, "int8") < error(values, Interval(-80.0, 80.0), "int8")


@pytest.mark.parametrize("name", DATA)
def test_max_is_the_range(name):
    values = DATA[name]
    peak = float(np.abs(values).max())
    assert CALIBRATORS["max"]().interval(Histogram.of(values), GRIDS["e4m3"]) == (-peak, peak)
    expected = (min(float(values.min()), 0), max(float(values.max()), 0))
    assert CALIBRATORS["max"]().interval(Histogram.of(values), GRIDS["uint8"]) == expected


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("name", DATA)
def test_percentile_is_that_of_the_sorted_numbers(name, percent):
    values, histogram = DATA[name], Histogram.of(DATA[name])
    exact = float(np.sort(np.abs(values))[math.ceil(percent / 100 * values.size) - 1])
    assert exact <= Percentile(percent).interval(histogram, GRIDS["int8"]).high <= exact + histogram.width
    low, high = Percentile(percent).interval(histogram, GRIDS["uint8"])
    outside = np.count_nonzero((values < low) | (values > high))
    assert outside <= (100 - percent) / 100 * values.size


def test_percentile_has_bounds():
    for percent in (0, -1, 101):
        with pytest.raises(ValueError, match="percent"):
            Percentile(percent)


@pytest.mark.parametrize("grid", ["e4m3", "int8", "int4", "uint8"])
@pytest.mark.parametrize("name", ["normal", "outliers", "one side", "off centre", "negative", "gelu", "mostly zeros"])
def test_mse_finds_the_least_error(name, grid):
    """Brute force over the numbers themselves, at 400 sizes (of each end, on an asymmetric grid 40 by 40)."""
    values = DATA[name]
    chosen = CALIBRATORS["mse"]().interval(Histogram.of(values), GRIDS[grid])
    whole = CALIBRATORS["max"]().interval(Histogram.of(values), GRIDS[grid])
    if grid == "uint8":
        factors = np.exp2(-np.linspace(0, 5, 40))
        tried = [Interval(whole.low * a, whole.high * b) for a in (factors if whole.low else [1]) for b in (factors if whole.high else [1])]
    else:
        tried = [Interval(-whole.high * f, whole.high * f) for f in np.exp2(-np.linspace(0, 7, 400))]
    least = min(error(values, interval, grid) for interval in tried)
    # What is searched is the histogram: bins of 1/16 of a code or less, so that errors are known to a few per cent.
    assert error(values, chosen, grid) <= 1.02 * least


def kl(counts, edge, levels):
    """Migacz's slides, loop by loop: counts of |x| up to `edge` bins against the same in `levels` cells of one scale."""
    p = counts[:edge].astype(float)
    p[np.flatnonzero(p)[-1]] += counts[edge:].sum()
    q = np.zeros(edge)
    cells = np.array([round((i + 0.5) / edge * levels) for i in range(edge)])
    for cell in range(levels + 1):
        bins = np.flatnonzero(cells == cell)
        held = [i for i in bins if counts[i]]
        for i in held:
            q[i] = counts[bins].sum() / len(held)
    p, q = p / p.sum(), q / q.sum()
    return float(sum(p[i] * math.log(p[i] / q[i]) for i in range(edge) if p[i]))


@pytest.mark.parametrize("name", ["normal", "outliers", "one side", "gelu"])
def test_entropy_finds_the_least_divergence(name):
    """For int8, whose cells are equally wide, at every seventh edge."""
    histogram = Histogram.of(DATA[name])
    chosen = CALIBRATORS["entropy"]().interval(histogram, GRIDS["int8"]).high
    histogram = histogram.coarsened(histogram.exponent + 1)
    counts = histogram.magnitudes()
    edge = min(math.ceil(chosen / histogram.width), counts.size)
    found = kl(counts, edge, 127)
    assert Distribution(histogram, GRIDS["int8"]).divergence(-edge, edge) == pytest.approx(found, rel=1e-9)
    assert all(kl(counts, e, 127) >= found - 1e-12 for e in range(128, counts.size, 7))


def test_entropy_of_what_lies_on_the_grid_is_zero():
    histogram = Histogram.of(np.repeat(np.arange(128, dtype=np.float32), np.arange(1, 129)))
    distribution = Distribution(histogram, GRIDS["int8"])
    assert distribution.divergence(-distribution.stop, distribution.stop) == pytest.approx(0, abs=1e-12)
    assert distribution.divergence(0, 0) == math.inf


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("axis", [0, -2])
@pytest.mark.parametrize("method", channel_calibrators())
def test_channels_are_calibrated_one_by_one(method, axis, grid):
    weight = (rng(3).standard_normal((4, 3, 40)) * rng(4).uniform(0.01, 30, (4, 3, 1))).astype(np.float32)
    weight[2] = 0
    weight[:, 1] = 0
    calibrator = CALIBRATORS[method]()
    found = calibrator.channels(weight, axis, GRIDS[grid])
    rows = np.moveaxis(weight, axis, 0)
    assert found.low.shape == found.high.shape == (len(rows),)
    scale, _ = GRIDS[grid].parameters(found)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    for index, row in enumerate(rows):
        alone = calibrator.interval(Histogram.of(row), GRIDS[grid])
        if method != "mse":
            assert (found.low[index], found.high[index]) == alone
        elif row.any():  # which weighs the numbers themselves, and so is at most a little worse than the histogram's choice
            here = Interval(found.low[index], found.high[index])
            assert error(row, here, grid) <= 1.05 * error(row, CALIBRATORS["max"]().interval(Histogram.of(row), GRIDS[grid]), grid)


def test_grids_round_as_onnx_does():
    values = rng(5).standard_normal(500).astype(np.float32) * 3
    for name in ("int8", "uint8"):
        grid = GRIDS[name]
        scale, zero = grid.parameters(grid.interval(-2.0, 4.0))
        scale = np.float32(scale)
        graph = onnx.parser.parse_graph(f"g (float[500] x, float s, {name} z) => ({name}[500] y) {{ y = QuantizeLinear(x, s, z) }}")
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
        (got,) = ReferenceEvaluator(model).run(None, {"x": values, "s": scale, "z": np.dtype(name).type(zero)})
        expected = np.maximum(got.astype(np.int64), -127) if name == "int8" else got  # -128 is not on our grid
        # float64 here, float32 there: a quotient beside a tie may fall to either side.
        assert np.count_nonzero(grid.codes(values, Parameters(scale, zero)) != expected) <= 1


def test_e4m3_is_rounded_and_saturates():
    grid = GRIDS["e4m3"]
    parameters = grid.parameters(grid.interval(-1, 448))
    assert parameters == (1.0, 0)
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = every[np.isfinite(every)]
    np.testing.assert_array_equal(grid.read(every, parameters), every)
    np.testing.assert_array_equal(
        grid.read(np.float32([1e9, -449.0, 17.0, 2.0**-10, 3 * 2.0**-10]), parameters), [448, -448, 16, 0, 2.0**-8]
    )


def test_scales_are_never_zero():
    grid = Grid("test", -127, 127)
    assert grid.parameters(grid.interval(-1e-45, 1e-45)).scale == SMALLEST_SCALE
    assert grid.parameters(Interval(np.array([0.0, -2.0]), np.array([0.0, 2.0]))).scale.tolist() == [1.0, 2.0 / 127]


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="unknown calibration method 'percentil'") as caught:
        CALIBRATORS["percentil"]
    assert "percentile" in caught.value.hint
