"""The rectified-flow sampler on fields whose solution is known, and the inputs that it hands to calibration."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from isthmus.models.flow import RectifiedFlowSampler, digits_sampler, trajectory_inputs

NAMES = tuple("abcd")


def sampler(**settings):
    defaults = {"shape": (1, 2, 3), "labels": (0, 1, 2, 2), "names": NAMES, "null_label": 4}
    return RectifiedFlowSampler(**{**defaults, **settings})


def noise(shape, seed=5):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


class Field:
    """A velocity given as a function of (x, t in [0, 1], y), which remembers what it was asked."""

    def __init__(self, velocity):
        self.velocity = velocity
        self.calls = []

    def __call__(self, inputs):
        assert set(inputs) == {"x", "t", "y"}
        assert (inputs["x"].dtype, inputs["t"].dtype, inputs["y"].dtype) == (np.float32, np.float32, np.int64)
        self.calls.append({name: value.copy() for name, value in inputs.items()})
        return {"sample": self.velocity(inputs["x"], inputs["t"][:, None, None, None] / 1000, inputs["y"]).astype(np.float32)}


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_straight_flow_is_integrated_exactly(method, steps):
    """With one picture a class, the velocity noise - x0 is known: (x - x0) / t, and every path is a straight line."""
    pictures = np.linspace(-0.9, 0.9, 5 * 6).reshape(5, 1, 2, 3).astype(np.float32)
    field = Field(lambda x, t, y: (x - pictures[y]) / t)
    # Guidance would leave the line, and Heun's last interval is an Euler step because the field ends at t = 0.
    got = sampler(guidance=1.0, steps=steps, method=method)(field, np.random.default_rng(5))
    np.testing.assert_allclose(got.images, (pictures[[0, 1, 2, 2], 0] + 1) / 2, atol=1e-6)
    assert got.captions == ("a", "b", "c", "c")
    assert got.images.dtype == np.float32
    assert got.images.shape == (4, 2, 3)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
    """dx/dt = x has the solution x(0) = x(1) / e."""
    exact = noise((4, 1, 2, 3)) / np.e
    exact = np.clip((exact[:, 0] + 1) / 2, 0, 1)
    errors = []
    for steps in (8, 16):
        images = sampler(guidance=1.0, steps=steps, method=method)(Field(lambda x, _t, _y: x), np.random.default_rng(5)).images
        errors.append(np.abs(images - exact).max())
    # Heun's last interval is first order, one of `steps`: the whole stays second order.
    assert 2 ** (order - 0.3) < errors[0] / errors[1] < 2 ** (order + 0.3)


def test_guidance_is_one_call_on_a_doubled_batch():
    field = Field(lambda x, _t, y: np.where(y == 4, 1.0, 0.25)[:, None, None, None] * np.ones_like(x))
    draw = sampler(guidance=3.0, steps=5)
    images = draw(field, np.random.default_rng(5)).images
    assert draw.batch == 8
    assert len(field.calls) == 5
    for call, t in zip(field.calls, (1000, 800, 600, 400, 200), strict=True):
        assert len(call["x"]) == len(call["t"]) == len(call["y"]) == draw.batch
        np.testing.assert_array_equal(call["x"][:4], call["x"][4:])
        np.testing.assert_allclose(call["t"], t, rtol=1e-6)
        np.testing.assert_array_equal(call["y"], [0, 1, 2, 2, 4, 4, 4, 4])
    # null + 3 (given - null) = 1 - 3 * 0.75, over a time of 1, backwards
    expected = noise((4, 1, 2, 3))[:, 0] + 1.25
    np.testing.assert_allclose(images, np.clip((expected + 1) / 2, 0, 1), atol=1e-6)


def test_without_guidance_the_batch_is_single():
    field = Field(lambda x, _t, _y: x)
    draw = sampler(guidance=1.0, steps=2)
    draw(field, np.random.default_rng(0))
    assert draw.batch == 4
    assert [len(call["x"]) for call in field.calls] == [4, 4]


def test_heun_asks_twice_an_interval_and_never_at_time_zero():
    field = Field(lambda x, _t, _y: x)
    sampler(guidance=1.0, steps=3, method="heun")(field, np.random.default_rng(0))
    np.testing.assert_allclose([call["t"][0] for call in field.calls], [1000, 2000 / 3, 2000 / 3, 1000 / 3, 1000 / 3], rtol=1e-6)


def test_the_generator_decides_and_pictures_are_clipped():
    draw = sampler(steps=2)
    still = Field(lambda x, _t, _y: 0 * x)
    first, again, other = (draw(still, np.random.default_rng(seed)).images for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    wide = draw(Field(lambda x, _t, _y: 100 * x), np.random.default_rng(1)).images
    assert (wide.min(), wide.max()) == (0, 1)


def test_colour_and_other_names():
    def step(inputs):
        assert set(inputs) == {"latent", "time", "caption"}
        assert inputs["caption"].shape == (8, 2)
        return {"velocity": 0 * inputs["latent"]}

    draw = sampler(
        shape=(3, 2, 5),
        latent="latent",
        time="time",
        output="velocity",
        condition=lambda labels: {"caption": np.zeros((len(labels), 2), np.float32)},
    )
    assert draw(step, np.random.default_rng(0)).images.shape == (4, 2, 5, 3)


@pytest.mark.parametrize(
    "settings", [{"shape": (4, 8, 8)}, {"labels": ()}, {"labels": (4,)}, {"steps": 0}, {"guidance": 0.5}, {"method": "midpoint"}]
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=r"must|channels"):
        sampler(**settings)


def test_digits_grid():
    draw = digits_sampler()
    assert draw.batch == 40
    assert draw(lambda inputs: {"sample": 0 * inputs["x"]}, np.random.default_rng(0)).captions == tuple("0123456789") * 2


@pytest.mark.parametrize(("size", "batch"), [(3, 8), (1, 1), (10, 40), (25, 7)])
def test_trajectory_inputs_cover_all_times_in_every_batch(size, batch):
    draw = sampler(steps=10)
    field = Field(lambda x, _t, _y: x)
    found = list(trajectory_inputs(draw, field, np.random.default_rng(0), size=size, batch=batch))
    assert len(found) == size
    seen = {(row.tobytes(), float(t), int(y)) for call in field.calls for row, t, y in zip(call["x"], call["t"], call["y"], strict=True)}
    rows = [(row.tobytes(), float(t), int(y)) for item in found for row, t, y in zip(item["x"], item["t"], item["y"], strict=True)]
    assert len(rows) == size * batch
    assert set(rows) <= seen
    if batch >= 10:
        for item in found:
            np.testing.assert_allclose(np.unique(item["t"]), np.arange(1, 11) * 100.0, rtol=1e-6)
    elif batch > 1:
        for item in found:
            assert np.all(np.diff(item["t"]) <= 0)
            assert item["t"].max() - item["t"].min() >= 500


def test_trajectory_rows_are_not_repeated():
    draw = dataclasses.replace(sampler(steps=5), guidance=1.0)
    found = list(trajectory_inputs(draw, Field(lambda x, _t, _y: x), np.random.default_rng(0), size=5, batch=4))
    rows = [(row.tobytes(), float(t)) for item in found for row, t in zip(item["x"], item["t"], strict=True)]
    assert len(set(rows)) == 20


@pytest.mark.parametrize(("size", "batch"), [(0, 1), (1, 0)])
def test_trajectory_bounds(size, batch):
    with pytest.raises(ValueError, match="at least 1"):
        next(trajectory_inputs(sampler(), lambda inputs: inputs, np.random.default_rng(0), size=size, batch=batch))
