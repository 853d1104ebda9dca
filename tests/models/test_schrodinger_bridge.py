"""Schroedinger bridges: the chains against their formulas in float64, and the fitting on the host against the bridge between Gaussians."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.schrodinger_bridge import iterative_proportional_fitting

TINY = MODELS["schrodinger-bridge-tiny"]


def draw(spec, seed=0, batch=2):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {"batch": batch})


def mlp_fp64(state, name, x, layers):
    for i in range(layers):
        x = x if i == 0 else np.where(x > 0, x, 0.01 * x)
        x = state[f"{name}.layers.{i}.weight"] @ x + state[f"{name}.layers.{i}.bias"]
    return x


def drift_fp64(config, state, name, x, k):
    half = config.embedding // 2
    angles = k * 10000.0 ** (-np.arange(half) / (half - 1))
    t = mlp_fp64(state, f"{name}.t_encoder", np.concatenate([np.sin(angles), np.cos(angles)]), 2)
    return mlp_fp64(state, f"{name}.net", np.concatenate([mlp_fp64(state, f"{name}.x_encoder", x, 2), t]), 3)


@pytest.mark.parametrize("settings", [{}, {"direction": "forward"}, {"steps": 3, "features": 2, "gamma": 0.5}])
def test_forward_is_the_formula(settings):
    spec, config = TINY.spec(settings), dataclasses.replace(TINY.config, **settings)
    module = random_weights(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    inputs = draw(spec)
    end, path = module(**inputs)
    backward = config.direction == "backward"
    for i in range(2):
        x = inputs["x"][i].double().numpy()
        for k in range(config.steps):
            assert np.abs(path[i, k].numpy() - x).max() < 1e-4
            x = x + drift_fp64(config, state, "backwards" if backward else "forwards", x, k)
            if not (backward and k == config.steps - 1):
                x = x + np.sqrt(2 * config.gamma) * inputs["noise"][i, k].double().numpy()
        assert np.abs(end[i].numpy() - x).max() < 1e-5 * max(1, np.abs(path.numpy()).max())
        assert torch.equal(end, path[:, -1])


def test_the_forms_share_their_weights_and_differ():
    names = ("schrodinger-bridge-tiny", "schrodinger-bridge-forward-tiny")
    backward, forward = (random_weights(MODELS[name].spec(), seed=1) for name in names)
    assert set(backward.state_dict()) == set(forward.state_dict())
    inputs = draw(TINY.spec())
    assert (backward(**inputs)[0] - forward(**inputs)[0]).abs().max() > 0.1


def test_published_size():
    """Two of the authors' ScoreNetwork: encoders of 16 and 32, layers of 128, on 2-D data."""
    with torch.device("meta"):
        module = MODELS["schrodinger-bridge-2d"].spec().build()
    encoders = (16 * 16 + 16 + 16 * 32 + 32) + (2 * 16 + 16 + 16 * 32 + 32)
    assert sum(p.numel() for p in module.parameters()) == 2 * (encoders + 64 * 128 + 128 + 128 * 128 + 128 + 128 * 2 + 2)
    layers = [f"{part}.layers.{i}" for part, count in (("t_encoder", 2), ("x_encoder", 2), ("net", 3)) for i in range(count)]
    assert set(module.forwards.state_dict()) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def least_squares(places, changes):
    """A drift that is linear in the place, for each step: what the bridge between Gaussians has."""
    maps = []
    for x, change in zip(places, changes, strict=True):
        design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        maps.append(np.linalg.lstsq(design, change, rcond=None)[0])
    return lambda x, k: np.concatenate([x, np.ones((len(x), 1))], axis=1) @ maps[k]


def run(x, drift, gammas, rng):
    for k, gamma in enumerate(gammas):
        x = x + drift(x, k) + np.sqrt(2 * gamma) * rng.standard_normal(x.shape)
    return x


def test_fitting_finds_the_bridge_between_gaussians():
    """Between N(m, s^2) and N(n, r^2), over a Brownian motion of variance v: cov(x_0, x_1) = (sqrt(4 s^2 r^2 + v^2) - v) / 2
    (Mallasto, Gerolin & Minh, arXiv:2006.03416), and both marginals hold. The paper's regression is exact as the steps grow short: what is
    missing of the mean falls with their size.
    """
    (m, s), (n, r), v = (1.0, 0.7), (-2.0, 1.5), 0.8
    covariance = (np.sqrt(4 * s**2 * r**2 + v**2) - v) / 2
    missing = []
    for steps in (20, 80):
        rng, gammas = np.random.default_rng(0), [v / 2 / steps] * steps
        forward, backward = iterative_proportional_fitting(
            lambda count, rng=rng: m + s * rng.standard_normal((count, 1)),
            lambda count, rng=rng: n + r * rng.standard_normal((count, 1)),
            least_squares,
            gammas=gammas,
            iterations=10,
            samples=4000,
            rng=rng,
        )
        x = m + s * rng.standard_normal((20_000, 1))
        y = run(x, forward, gammas, rng)
        missing.append(abs(y.mean() - n))
    assert missing[1] < 0.5 * missing[0]
    assert missing[1] < 0.12
    assert abs(y.std() / r - 1) < 0.05
    assert abs(np.cov(x[:, 0], y[:, 0])[0, 1] / covariance - 1) < 0.08
    y = n + r * rng.standard_normal((20_000, 1))
    x = run(y, backward, gammas[::-1], rng)
    assert abs(x.mean() - m) < 0.08
    assert abs(x.std() / s - 1) < 0.05
    assert abs(np.cov(x[:, 0], y[:, 0])[0, 1] / covariance - 1) < 0.08


@pytest.mark.parametrize("settings", [{"steps": 0}, {"gamma": 0.0}, {"embedding": 3}, {"direction": "up"}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)
