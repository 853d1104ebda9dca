"""Rectified flow in a graph against the sampler on the host, and its order against a flow in closed form."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.flow import TIME_SCALE, RectifiedFlowSampler
from isthmus.models.rectified_flow import flow_calls, integrate_calls

TINY = MODELS["rectified-flow-tiny"]


def velocity_fp64(state, x, t, y):
    """The network from its formula, one row."""
    h = state["velocity.net.state.weight"] @ x + state["velocity.net.state.bias"] + state["velocity.net.time.weight"][:, 0] * t
    if y is not None:
        h = h + state["velocity.label.weight"][y]
    h = np.tanh(state["velocity.net.rest.1.weight"] @ np.tanh(h) + state["velocity.net.rest.1.bias"])
    return state["velocity.net.rest.3.weight"] @ h + state["velocity.net.rest.3.bias"]


@pytest.mark.parametrize("settings", [{}, {"method": "heun", "steps": 3}, {"classes": 0, "steps": 1}, {"method": "heun", "steps": 1}])
def test_forward_is_the_formula(settings):
    spec, config = TINY.spec(settings), dataclasses.replace(TINY.config, **settings)
    module = random_weights(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    inputs = spec.inputs(np.random.Generator(np.random.PCG64(0)), {"batch": 3})
    got = module(**inputs).numpy()
    for i in range(3):
        x, y = inputs["noise"][i].double().numpy(), inputs["y"][i].item() if config.classes else None
        for k in range(config.steps):
            t, after = 1 - k / config.steps, 1 - (k + 1) / config.steps
            v = velocity_fp64(state, x, t, y)
            if config.method == "heun" and k < config.steps - 1:
                v = (v + velocity_fp64(state, x + (after - t) * v, after, y)) / 2
            x = x + (after - t) * v
        assert np.abs(got[i] - x).max() < 2e-6 * np.ptp(got)
    assert np.abs(got - inputs["noise"].numpy()).max() > 0.1


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_graph_is_the_hosts_loop(method):
    """`RectifiedFlowSampler` around the same network."""
    spec = TINY.spec({"method": method, "steps": 5})
    module = random_weights(spec, seed=1)
    labels = (3, 7)
    sampler = RectifiedFlowSampler(
        shape=(1, 4, 4), labels=labels, names=tuple("0123456789"), null_label=0, guidance=1.0, steps=5, method=method
    )

    def step(inputs):
        times = inputs["t"] / TIME_SCALE
        assert np.ptp(times) == 0
        x = torch.from_numpy(inputs["x"]).reshape(2, 16)
        return {"sample": module.velocity(x, float(times[0]), torch.from_numpy(inputs["y"])).reshape(2, 1, 4, 4).numpy()}

    given, wanted = sampler.loop_case(step, np.random.default_rng(0))
    got = module(torch.from_numpy(given["noise"]).reshape(2, 16), torch.tensor(labels)).numpy()
    expected = wanted["latents"].reshape(2, 16)
    assert np.abs(got - expected).max() < 1e-5 * np.ptp(expected)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_order_of_convergence(method, order):
    """Of data N(0, s^2), whose flow is known: v = x (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2), which takes x_1 to s x_1."""
    x, s, errors = torch.linspace(-2, 2, 9, dtype=torch.float64), 0.6, []

    def velocity(x, time):
        t = time / TIME_SCALE
        return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    for steps in (64, 128):
        errors.append((integrate_calls(velocity, x, flow_calls(steps, method)) - s * x).abs().max().item())
    assert order - 0.15 < np.log2(errors[0] / errors[1]) < order + 0.25


def test_every_label_matters():
    module = random_weights(TINY.spec(), seed=1)
    noise = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).expand(10, 16)
    got = module(noise, torch.arange(10))
    assert (got[:, None] - got[None]).abs().amax(2)[~torch.eye(10, dtype=torch.bool)].min() > 1e-3


def test_published_sizes():
    """The notebooks' network: 3 -> 100 -> 100 -> 2; and DiT-S/2's 33 M parameters."""
    with torch.device("meta"):
        small, large = (MODELS[name].spec().build() for name in ("rectified-flow-2d", "rectified-flow-dit-s-2"))
    assert sum(p.numel() for p in small.parameters()) == 3 * 100 + 100 + 100 * 100 + 100 + 100 * 2 + 2
    assert abs(sum(p.numel() for p in large.parameters()) / 33e6 - 1) < 0.01


def test_the_sampler_of_latents():
    """A small DiT: one Euler step is noise - v(noise, 1000, y)."""
    settings = {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "steps": 1}
    spec = MODELS["rectified-flow-dit-s-2"].spec(settings)
    module = random_weights(spec, seed=1)
    inputs = spec.inputs(np.random.Generator(np.random.PCG64(0)), {"batch": 2})
    expected = inputs["noise"] - module.velocity(inputs["noise"], torch.full((2,), 1000.0), inputs["y"])
    got = module(**inputs)
    assert (got - expected).abs().max() < 1e-6
    assert (got - inputs["noise"]).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [{"steps": 0}, {"method": "rk4"}, {"features": 0}, {"classes": -1}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)
