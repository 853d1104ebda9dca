"""Histograms are a function of the numbers alone: however the numbers come in, the counts are the same, and they are the true ones."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.calibration.histogram import BINS, EMPTY, Histogram, exponent_of
from isthmus.calibration.observation import Observation, Periods, merged

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = hnp.arrays(np.float32, st.integers(0, 40), elements=NUMBERS)
PARTS = st.lists(ARRAYS, min_size=1, max_size=5)


def counted(values, exponent):
    """The oracle: exact rational arithmetic, one number at a time."""
    found = {}
    for value in values:
        numerator, denominator = float(value).as_integer_ratio()
        shifted = (numerator << -exponent, denominator) if exponent < 0 else (numerator, denominator << exponent)
        index = shifted[0] // shifted[1]
        found[index] = found.get(index, 0) + 1
    return found


@settings(max_examples=150, deadline=None)
@given(ARRAYS)
def test_counts_are_the_true_ones(values):
    histogram = Histogram.of(values)
    assert dict(histogram) == counted(values, histogram.exponent)
    assert histogram.count == values.size
    if values.size:
        assert (histogram.min, histogram.max) == (float(values.min()), float(values.max()))
        assert histogram.counts[0] > 0 < histogram.counts[-1]
        assert histogram.counts.size <= 2 * BINS
        assert histogram.counts.nbytes <= 64 * 2**10


@settings(max_examples=150, deadline=None)
@given(PARTS, st.randoms())
def test_shards_in_any_order_equal_one_run(parts, random):
    whole = Histogram.of(np.concatenate(parts))
    shards = [Histogram.of(part) for part in parts]
    assert reduce(Histogram.merge, shards) == whole
    random.shuffle(shards)
    assert reduce(lambda a, b: b.merge(a), shards, EMPTY) == whole


@settings(max_examples=100, deadline=None)
@given(NUMBERS, NUMBERS)
def test_the_exponent_is_the_smallest_that_fits(a, b):
    low, high = min(a, b), max(a, b)
    exponent = exponent_of(low, high, 12)

    def fits(e):
        return all(-BINS <= index < BINS for index in counted([low, high], e))

    assert fits(exponent)
    assert exponent == -161 or not fits(exponent - 1)


def test_the_range_grows_by_doubling_the_width():
    small = Histogram.of(np.arange(BINS, dtype=np.float32))
    assert (small.exponent, small.first, small.counts.size) == (0, 0, BINS)
    grown = small.merge(Histogram.of(np.float32([BINS])))
    assert (grown.exponent, grown.counts.size) == (1, BINS // 2 + 1)
    assert grown.counts.tolist() == [2] * (BINS // 2) + [1]
    assert small.merge(Histogram.of(np.float32([-BINS]))).exponent == 0  # the last bin on its side


def test_asymmetric_numbers_have_bins_on_both_sides():
    histogram = Histogram.of(np.float32([-1.0, -0.5, 0.0, 3.0, 3.9]))
    assert histogram.magnitudes().sum() == 5
    assert histogram.amax == float(np.float32(3.9))
    only = Histogram.of(np.float32([-4.0, -3.0, -3.0]))
    assert only.magnitudes().sum() == 3
    assert only.amax == 4.0
    assert only.quantile(1.0) == 4.0
    assert only.quantile(0.5) == 3.0  # on an edge, a negative number counts in the bin below it


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e6, 1e6, width=32)), st.floats(0.01, 1.0))
def test_quantiles_are_within_a_bin_of_those_of_the_sorted_numbers(values, share):
    histogram = Histogram.of(values)
    exact = float(np.sort(np.abs(values))[math.ceil(share * values.size) - 1])
    assert exact <= histogram.quantile(share) <= exact + histogram.width


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e6, 1e6, width=32)), st.floats(0.0, 0.4))
def test_tails_hold_at_most_their_share(values, share):
    histogram = Histogram.of(values)
    low, high = histogram.tails(share)
    for beyond in (values < low, values > high):
        assert np.count_nonzero(beyond) <= share * values.size
    # One bin more would be too much.
    allowed, values = math.floor(share * values.size), values.astype(np.float64)
    assert np.count_nonzero(values < low + histogram.width) > allowed
    assert np.count_nonzero(values >= high - histogram.width) > allowed


def test_coarser_bins_hold_the_same_numbers():
    values = np.random.Generator(np.random.PCG64(0)).standard_normal(5000).astype(np.float32)
    histogram = Histogram.of(values)
    few = histogram.summary(64)
    assert few.counts.size <= 64 < 2 * few.counts.size
    assert dict(few) == counted(values, few.exponent)
    with pytest.raises(ValueError, match="cannot be cut"):
        few.coarsened(few.exponent - 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        Histogram.of(np.float32([1.0, bad]))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_other_types_count_alike(dtype):
    values = np.arange(-9, 12).astype(dtype)
    assert Histogram.of(values) == Histogram.of(values.astype(np.float32))


def test_chunks_do_not_show():
    values = np.random.Generator(np.random.PCG64(1)).standard_normal((3, 50_000)).astype(np.float32)
    histogram = Histogram.of(values)
    indices, counts = np.unique(np.floor(values.astype(np.float64) / histogram.width), return_counts=True)
    assert dict(histogram) == dict(zip(indices.astype(int).tolist(), counts.tolist(), strict=True))


ROWS = st.lists(st.tuples(st.floats(0, 1000, width=32), hnp.arrays(np.float32, 3, elements=st.floats(-100, 100, width=32))), min_size=1)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(0, 10))
def test_periods_in_shards_equal_one_run(rows, cut):
    times, values = np.float32([t for t, _ in rows]), np.stack([v for _, v in rows])
    whole = Periods.of(times, values)
    assert sum(count for count, _, _ in whole.found.values()) == len(rows)
    for index, (_, low, high) in whole.found.items():
        inside = values[np.floor(times.astype(np.float64) * 2.0**-whole.exponent) == index]
        assert (low, high) == (inside.min(), inside.max())
    assert len(whole.found) <= 17
    cut = min(cut, len(rows) - 1)
    if cut:
        a, b = Periods.of(times[:cut], values[:cut]), Periods.of(times[cut:], values[cut:])
        assert a.merge(b) == b.merge(a) == whole


def test_what_two_processes_saw_is_what_one_would_have_seen():
    rng = np.random.Generator(np.random.PCG64(2))
    calls = [(rng.standard_normal((4, 8)).astype(np.float32), rng.uniform(0, 1000, 4).astype(np.float32)) for _ in range(6)]

    def seen(part):
        found = {}
        for values, times in part:
            found = merged(found, {"a": Observation.of(values, times), "b": Observation.of(values * 7)})
        return found

    assert merged(seen(calls[:2]), seen(calls[2:])) == seen(calls)


def test_what_is_seen_call_by_call_is_what_merging_gives():
    generator = np.random.Generator(np.random.PCG64(3))
    calls = [(generator.standard_normal((6, 50)) * size).astype(np.float32) for size in (1e-3, 40.0, 2.0, 9000.0, 0.0, 1e-3)]
    times = [generator.random(6) * size for size in (1.0, 0.5, 900.0, 900.0, 3.0, 0.0)]
    merged = seen = Observation()
    for values, at in zip(calls, times, strict=True):
        merged = merged.merge(Observation.of(values, at))
        seen = seen.seen(values, at)
    assert seen.histogram == merged.histogram == Histogram.of(np.concatenate(calls))
    assert seen.periods == merged.periods
    assert sum(rows for rows, _, _ in seen.periods.found.values()) == 36
