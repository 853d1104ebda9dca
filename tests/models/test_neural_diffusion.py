"""Neural SDEs against Euler-Maruyama in float64, and its strong order against solutions in closed form."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.neural_diffusion import NeuralDiffusion, NeuralDiffusionConfig

TINY = MODELS["neural-diffusion-tiny"]


def draw(spec, seed=0, batch=2):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {"batch": batch})


def mlp_fp64(state, name, t, x, activation):
    h = state[f"{name}.state.weight"] @ x + state[f"{name}.state.bias"] + state[f"{name}.time.weight"][:, 0] * t
    return state[f"{name}.rest.1.weight"] @ activation(h) + state[f"{name}.rest.1.bias"]


def lipswish(x):
    return 0.909 * x / (1 + np.exp(-x))


def path_fp64(config, state, x, noise):
    """One row."""
    if config.initial_size:
        h = lipswish(state["initial.0.weight"] @ x + state["initial.0.bias"])
        x = state["initial.2.weight"] @ h + state["initial.2.bias"]
    h, activation = config.t1 / config.steps, lipswish if config.bounded else np.tanh
    bound = np.tanh if config.bounded else np.asarray
    path = [x]
    for k in range(config.steps):
        mu = bound(mlp_fp64(state, "drift", k * h, x, activation))
        sigma = bound(mlp_fp64(state, "diffusion", k * h, x, activation))
        matrix = sigma.reshape(len(x), -1) if config.noise_size else np.diag(np.log1p(np.exp(sigma)))
        x = x + mu * h + matrix @ noise[k] * np.sqrt(h)
        path.append(x)
    states = np.stack(path)
    return x, states @ state["readout.weight"].T + state["readout.bias"] if config.readout else states


@pytest.mark.parametrize("settings", [{}, {"noise_size": 3, "initial_size": 5, "readout": 2, "bounded": True}, {"noise_size": 2}])
def test_forward_is_the_formula(settings):
    spec, config = TINY.spec(settings), dataclasses.replace(TINY.config, **settings)
    module = random_weights(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    inputs = draw(spec)
    end, path = module(**inputs)
    for i in range(2):
        expected = path_fp64(config, state, inputs["x"][i].double().numpy(), inputs["noise"][i].double().numpy())
        for got, want in zip((end[i], path[i]), expected, strict=True):
            assert got.shape == want.shape
            assert np.abs(got.numpy() - want).max() <= 3e-6 * np.ptp(path.numpy())


class Times(nn.Module):
    """A field a x + b."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, t, x):  # noqa: ARG002 - an autonomous field
        return self.a * x + self.b


def strong_errors(drift, diffusion, exact, levels):
    """The mean error at the end over many paths of one Brownian motion, sampled ever more finely."""
    finest = levels[-1]
    noise = torch.randn(4000, finest, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for steps in levels:
        grouped = noise.reshape(4000, steps, finest // steps, 1).sum(2) / np.sqrt(finest // steps)
        config = NeuralDiffusionConfig(features=1, noise_size=1, steps=steps)
        end, _ = NeuralDiffusion(config, drift, diffusion)(torch.ones(4000, 1, dtype=torch.float64), grouped)
        errors.append((end - exact(noise / np.sqrt(finest))).abs().mean().item())
    return errors


def test_strong_order_one_half():
    """Of geometric Brownian motion, dx = 0.5 x dt + x dW: x = exp(0.5 t - t / 2 + W)."""
    errors = strong_errors(Times(0.5, 0.0), Times(1.0, 0.0), lambda dw: torch.exp(dw.sum(1)), (16, 64, 256))
    slopes = [np.log2(a / b) / 2 for a, b in itertools.pairwise(errors)]
    assert all(0.4 < slope < 0.65 for slope in slopes)


def test_the_moments_of_an_ornstein_uhlenbeck_process():
    """dx = -2 x dt + 0.6 dW from 1: mean exp(-2), variance 0.09 (1 - exp(-4))."""
    noise = torch.randn(100_000, 64, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    module = NeuralDiffusion(NeuralDiffusionConfig(features=1, noise_size=1, steps=64), Times(-2.0, 0.0), Times(0.0, 0.6))
    end, _ = module(torch.ones(100_000, 1, dtype=torch.float64), noise)
    assert abs(end.mean().item() - np.exp(-2)) < 6e-3
    assert abs(end.var().item() / (0.09 * (1 - np.exp(-4))) - 1) < 0.05


def test_published_size():
    """The generator of the SDE-GAN: 368 in the first MLP, 560 in the drift, 1104 in the diffusion, 17 in the readout."""
    with torch.device("meta"):
        module = MODELS["neural-diffusion-sde-gan"].spec().build()
    assert sum(p.numel() for p in module.parameters()) == 368 + 560 + 1104 + 17


@pytest.mark.parametrize("settings", [{"steps": 0}, {"noise_size": -1}, {"t1": 0.0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)
