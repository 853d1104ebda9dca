"""Ranges of the values of a program while it runs, against numpy."""

import math

import numpy as np
import pytest
from coremltools.converters.mil import Builder

from isthmus.exporter.errors import UsageError
from isthmus.targets.coreml.interpreter import Observed, observe, peaks

mb = Builder


def normal(*shape, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)


def layer(x):
    scaled = mb.mul(x=x, y=np.float32(3.0), name="scaled")
    positive = mb.relu(x=scaled, name="positive")
    count = mb.cast(x=mb.greater(x=x, y=np.float32(0.0), name="flags"), dtype="int32", name="count")
    return mb.reduce_sum(x=positive, axes=[1], name="total"), count


def test_ranges_are_those_of_all_samples(program):
    built, _ = program(layer, normal(4, 5))
    samples = [normal(4, 5, seed=seed) for seed in range(3)]
    observed = observe(built, ({"a": x} for x in samples))
    x = np.stack(samples)
    expected = {"a": x, "scaled": x * 3, "positive": np.maximum(x * 3, 0), "total": np.maximum(x * 3, 0).sum(2)}
    assert list(observed) == list(expected), "in the order of the program, without booleans, integers and constants"
    for name, values in expected.items():
        got = observed[name]
        np.testing.assert_allclose((got.low, got.high), (values.min(), values.max()), rtol=1e-6)
        assert got.dtype == "float32"
        assert got.shape == values.shape[1:]
    assert [observed[name].operation for name in expected] == ["input", "mul", "relu", "reduce_sum"]


@pytest.mark.parametrize(("low", "high", "peak"), [(-4.0, 2.0, 4.0), (-1.0, 8.0, 8.0), (0.0, 0.0, 0.0), (-math.inf, 1.0, math.inf)])
def test_the_head_room_of_float16(low, high, peak):
    value = Observed("mul", "float32", (2,), low, high)
    assert value.peak == peak
    assert value.head_room == (math.inf if peak == 0.0 else 65504.0 / peak)


def test_a_value_that_would_overflow(program):
    built, inputs = program(lambda a: mb.mul(x=a, y=a, name="square"), np.float32([300.0, 1.0]))
    square = observe(built, [inputs])["square"]
    assert (square.low, square.high) == (1.0, 90000.0)
    assert square.head_room == pytest.approx(0.72782, rel=1e-4), "float16 ends at 65504"
    halves, inputs = program(lambda a: mb.mul(x=a, y=a, name="square"), np.float16([300.0, 1.0]))
    square = observe(halves, [inputs])["square"]
    assert (square.dtype, square.high, square.head_room) == ("float16", math.inf, 0.0)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_is_not_a_number_once_stays_so_and_comes_first(program, at):
    def function(a):
        return mb.sqrt(x=a, name="root"), mb.mul(x=a, y=np.float32(100.0), name="large")

    built, _ = program(function, np.ones(2, np.float32))
    samples = [np.float32([4.0, 9.0])] * 3
    samples[at] = np.float32([-1.0, 4.0])
    observed = observe(built, ({"a": x} for x in samples))
    assert math.isnan(observed["root"].low)
    assert math.isnan(observed["root"].peak)
    assert math.isnan(observed["root"].head_room)
    assert observed["large"].high == 900.0
    assert [name for name, _ in peaks(observed)] == ["root", "large", "a"]


def test_peaks_are_sorted_from_the_largest():
    values = {name: Observed("add", "float32", (), low, high) for name, low, high in [("b", -7.0, 1.0), ("c", 0.0, 2.0), ("a", 0.0, 7.0)]}
    values["z"] = Observed("add", "float32", (), -math.inf, 0.0)
    assert [name for name, _ in peaks(values)] == ["z", "a", "b", "c"]
    assert peaks({}) == []


def test_a_loop_is_seen_in_every_round(program):
    def function(a):
        def body(i, v):
            return mb.add(x=i, y=1), mb.mul(x=v, y=a, name="power")

        return mb.while_loop(_cond=lambda i, _: mb.less(x=i, y=4), _body=body, loop_vars=(np.int32(0), a), name="loop")[1]

    built, inputs = program(function, np.float32([-2.0]))
    observed = observe(built, [inputs])
    assert (observed["power"].low, observed["power"].high) == (-32.0, 16.0), "4, -8, 16 and -32"
    (carried,) = (value for name, value in observed.items() if value.operation == "input" and name != "a")
    assert (carried.low, carried.high) == (-8.0, 16.0), "what each round begins with"


def test_values_of_no_elements_have_no_range(program):
    built, inputs = program(lambda a: mb.slice_by_index(x=a, begin=[0], end=[0], name="none"), np.float32([1.0]))
    assert "none" not in observe(built, [inputs])


def test_no_samples_and_wrong_ones(program):
    built, inputs = program(lambda a: mb.relu(x=a), np.ones(2, np.float32))
    assert observe(built, []) == {}
    with pytest.raises(UsageError, match="do not fit the program"):
        observe(built, [inputs, {"a": np.ones(3, np.float32)}])
    with pytest.raises(UsageError, match="no function 'other'"):
        observe(built, [inputs], "other")
