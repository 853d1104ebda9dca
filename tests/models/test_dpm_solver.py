"""DPM-Solver++ against its formulas in float64, and its order against diffusion of Gaussian data, which is known in closed form."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.dpm_solver import Level, Solver, solve

TINY = MODELS["dpm-solver-tiny"]


def network_fp64(state, x, t, y):
    h = state["network.net.state.weight"] @ x + state["network.net.state.bias"] + state["network.net.time.weight"][:, 0] * t
    h = np.tanh(h + state["network.label.weight"][y])
    h = np.tanh(state["network.net.rest.1.weight"] @ h + state["network.net.rest.1.bias"])
    return state["network.net.rest.3.weight"] @ h + state["network.net.rest.3.bias"]


def schedule(t):
    alpha = np.exp(-(t**2) * (20 - 0.1) / 4 - t * 0.1 / 2)
    return alpha, np.sqrt(1 - alpha**2)


def half_log_snr(t):
    alpha, sigma = schedule(t)
    return np.log(alpha / sigma)


def grid_fp64(steps):
    """Even in half log-SNR, by bisection."""
    times = []
    for wanted in np.linspace(half_log_snr(1.0), half_log_snr(1e-3), steps + 1):
        low, high = 1e-4, 1.1
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if half_log_snr(middle) > wanted else (low, middle)
        times.append(low)
    return times


@pytest.mark.parametrize("settings", [{}, {"predicts": "noise", "steps": 4}, {"order": 1, "steps": 3}, {"steps": 16}])
def test_forward_is_the_formula(settings):
    """Equations of arXiv:2211.01095, algorithm 2, one row at a time."""
    spec, config = TINY.spec(settings), dataclasses.replace(TINY.config, **settings)
    module = random_weights(spec, seed=1).double()
    state = {key: value.numpy() for key, value in module.state_dict().items()}
    inputs = spec.inputs(np.random.Generator(np.random.PCG64(0)), {"batch": 2})
    got = module(inputs["noise"].double(), inputs["y"]).numpy()
    times, n = grid_fp64(config.steps), config.steps
    for row in range(2):
        x, y, datas = inputs["noise"][row].double().numpy(), inputs["y"][row].item(), []
        for i in range(1, n + 1):
            (alpha, sigma), (after_alpha, after_sigma) = schedule(times[i - 1]), schedule(times[i])
            out = network_fp64(state, x, times[i - 1], y)
            datas.append(out if config.predicts == "data" else (x - sigma * out) / alpha)
            h = half_log_snr(times[i]) - half_log_snr(times[i - 1])
            estimate = datas[-1]
            if config.order == 2 and i > 1 and not (i == n and n < 15):
                r = (half_log_snr(times[i - 1]) - half_log_snr(times[i - 2])) / h
                estimate = (1 + 1 / (2 * r)) * datas[-1] - 1 / (2 * r) * datas[-2]
            x = after_sigma / sigma * x - after_alpha * (np.exp(-h) - 1) * estimate
        assert np.abs(got[row] - x).max() < 1e-9 * np.abs(x).max()


@pytest.mark.parametrize(("order", "grid"), [(1, "logsnr"), (2, "logsnr"), (2, "time")])
@pytest.mark.parametrize("predicts", ["data", "noise"])
def test_the_order_of_convergence(order, grid, predicts):
    """Of data N(0, s^2): E[x_0 | x] = alpha s^2 x / v with v = alpha^2 s^2 + sigma^2, and the flow takes x to x sqrt(v' / v)."""
    s, errors = 0.7, []
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def variance(level):
        return level.alpha**2 * s**2 + level.sigma**2

    def network(x, level):
        data = level.alpha * s**2 / variance(level) * x
        return data if predicts == "data" else (x - level.alpha * data) / level.sigma

    for steps in (200, 400):
        levels = Solver(steps=steps, grid=grid, t_end=0.02).levels()
        exact = x * np.sqrt(variance(levels[-1]) / variance(levels[0]))
        errors.append((solve(network, x, levels, order=order, predicts=predicts) - exact).abs().max().item())
    assert order - 0.2 < np.log2(errors[0] / errors[1]) < order + 0.35


def test_the_grids():
    for kind in ("logsnr", "time"):
        levels = Solver(steps=10, grid=kind).levels()
        assert len(levels) == 11
        assert (levels[0].time, abs(levels[-1].time - 1e-3) < 1e-12) == (1.0, True)
        for level in levels:
            assert abs(level.alpha**2 + level.sigma**2 - 1) < 1e-12
            assert np.allclose((level.alpha, level.sigma), schedule(level.time), atol=1e-9)
    assert np.allclose([level.time for level in Solver(steps=10).levels()], grid_fp64(10), atol=1e-8)


def test_a_last_step_to_no_noise_gives_the_estimate():
    levels = [Level(1.0, 0.2, 0.98), Level(0.5, 0.8, 0.6), Level(0.0, 1.0, 0.0)]
    seen = []

    def network(x, level):
        seen.append((x, level))
        return 3 * x + level.time

    got = solve(network, torch.ones(2), levels)
    assert torch.equal(got, 3 * seen[1][0] + 0.5)
    assert len(seen) == 2


def test_the_sampler_of_latents():
    """A small DiT predicting noise: one step of DDIM from t = 1 to 1e-3."""
    settings = {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "steps": 1, "t_end": 0.8}
    spec = MODELS["dpm-solver-dit-s-2"].spec(settings)
    module = random_weights(spec, seed=1)
    inputs = spec.inputs(np.random.Generator(np.random.PCG64(0)), {"batch": 2})
    noise = module.network(inputs["noise"], torch.full((2,), 999.0), inputs["y"])
    (alpha, sigma), (after_alpha, after_sigma) = schedule(1.0), schedule(0.8)
    expected = after_alpha * (inputs["noise"] - sigma * noise) / alpha + after_sigma * noise
    assert (module(**inputs) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_published_size():
    """10 steps, and DiT-S/2's 33 M parameters."""
    with torch.device("meta"):
        module = MODELS["dpm-solver-dit-s-2"].spec().build()
    assert abs(sum(p.numel() for p in module.parameters()) / 33e6 - 1) < 0.01
    assert len(module.levels) == 11


@pytest.mark.parametrize("settings", [{"steps": 0}, {"order": 3}, {"grid": "even"}, {"predicts": "score"}, {"t_end": 1.0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)
