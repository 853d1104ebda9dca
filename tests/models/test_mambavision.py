"""MambaVision's mixer against its formula in float64, its windows, and its published sizes; tests/parity has the whole network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.mambavision import MambaVisionConfig, MambaVisionMixer, Stage

from .mamba_formulas import linear, silu, softplus

TINY = MODELS["mambavision-tiny"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def centred(weight, x):
    """A depthwise convolution of odd width over tokens x (L, d), zeros around them."""
    reach, out = weight.shape[2] // 2, np.zeros_like(x)
    for t in range(len(x)):
        for tap in range(-reach, reach + 1):
            if 0 <= t + tap < len(x):
                out[t] += weight[:, 0, tap + reach] * x[t + tap]
    return out


def mixer_fp64(state, x):
    """Tokens (L, D) to (L, D)."""
    stream, z = np.split(linear(state, "in_proj", x), 2, axis=1)
    u, v = silu(centred(state["conv1d_x.weight"], stream)), silu(centred(state["conv1d_z.weight"], z))
    A = -np.exp(state["A_log"])
    rank, size = state["dt_proj.weight"].shape[1], A.shape[1]
    dt, B, C = np.split(linear(state, "x_proj", u), [rank, rank + size], axis=1)
    delta = softplus(dt @ state["dt_proj.weight"].T + 2 * state["dt_proj.bias"])
    h, y = np.zeros_like(A), np.zeros_like(u)
    for t in range(len(x)):
        h = np.exp(delta[t][:, None] * A) * h + np.outer(delta[t] * u[t], B[t])
        y[t] = h @ C[t] + state["D"] * u[t]
    return linear(state, "out_proj", np.concatenate([y, v], axis=1))


@pytest.mark.parametrize(("conv_size", "length"), [(3, 9), (5, 2), (1, 4)])
def test_the_mixer_is_the_formula(conv_size, length):
    torch.manual_seed(0)
    mixer = MambaVisionMixer(16, 4, conv_size).requires_grad_(False)
    mixer.dt_proj.bias.add_(2.0)  # at the initial steps of 0.001 the scan says little
    x = torch.randn(2, length, 16)
    state = {key: value.double().numpy() for key, value in mixer.state_dict().items()}
    for got, tokens in zip(mixer(x).double().numpy(), x.double().numpy(), strict=True):
        expected = mixer_fp64(state, tokens)
        assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_windows_are_cut_and_joined(window):
    """Each window's tokens are its pixels in raster order, and joining gives the picture back."""
    stage = Stage(MambaVisionConfig(**{**vars(TINY.config), "windows": (8, 8, window, 2)}), 2)
    side = -(-4 // window) * window
    x = torch.randn(3, 5, side, side)
    tokens = stage._cut(x)
    expected = [
        x[i, :, row : row + window, column : column + window].reshape(5, -1).T
        for i in range(3)
        for row in range(0, side, window)
        for column in range(0, side, window)
    ]
    assert torch.equal(tokens, torch.stack(expected))
    assert torch.equal(stage._join(tokens), x)


@pytest.mark.parametrize(
    ("name", "millions"),  # table 1 of the paper
    [
        ("mambavision-t", 31.8),
        ("mambavision-t2", 35.1),
        ("mambavision-s", 50.1),
        ("mambavision-b", 97.7),
        ("mambavision-l", 227.9),
        ("mambavision-l2", 241.5),
    ],
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        module = MODELS[name].spec().build()
    assert abs(sum(p.numel() for p in module.parameters()) / 1e6 - millions) < 0.1  # the table rounds down now and then


def test_pictures_matter_everywhere():
    module = random_weights(TINY.spec(), seed=1)
    x = TINY.spec().inputs(np.random.default_rng(0), {"batch": 1})["x"]
    base = module(x)
    assert base.shape == (1, 10)
    for row in (0, 63):
        other = x.clone()
        other[0, :, row] += 1
        assert (module(other) - base).abs().max() > 1e-4


@pytest.mark.parametrize(
    "settings", [{"image_size": 48}, {"depths": (1, 1, 2)}, {"windows": (8, 8, 0, 2)}, {"conv_size": 2}, {"num_heads": (1, 1, 5, 4)}]
)
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        MambaVisionConfig(**{**vars(TINY.config), **settings})
