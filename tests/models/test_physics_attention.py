"""Physics-inspired attention against its formula in float64, and what it conserves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights

TINY = MODELS["physics-attention-tiny"]
SETTINGS = [
    {},
    {"causal": False},
    {"decay_length": 0.0, "radius": -1},
    {"radius": 0, "causal": False},
    {"num_heads": 4, "temperature": 3.0},
]


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})["x"]


def attention_fp64(config, state, x):
    """Outputs (L, D) and weights (heads, L, L), a sum over what each token may read."""
    q, k, v = (x @ state[f"{n}_proj.weight"].T + state[f"{n}_proj.bias"] for n in "qkv")
    size, length = config.hidden_size // config.num_heads, len(x)
    weights, fields = np.zeros((config.num_heads, length, length)), state["out_proj.bias"].copy()[None].repeat(length, 0)
    for head in range(config.num_heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(length):
            for j in range(length):
                near = config.radius < 0 or abs(i - j) <= config.radius
                if near and not (config.causal and j > i):
                    locality = np.exp(-abs(i - j) / config.decay_length) if config.decay_length else 1.0
                    weights[head, i, j] = locality * np.exp(q[i, part] @ k[j, part] / np.sqrt(size) / state["temperature"][0])
            weights[head, i] /= weights[head, i].sum()
        fields += weights[head] @ v[:, part] @ state["out_proj.weight"][:, part].T  # the superposition of the heads' fields
    return fields, weights


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("length", [1, 20])
def test_forward_is_the_formula(settings, length):
    spec = TINY.spec(settings)
    module = random_weights(spec, seed=1)
    state = {name: value.double().numpy() for name, value in module.state_dict().items()}
    x = 3 * draw(spec, length=length)
    y, weights = module(x)
    for row in range(2):
        expected, strengths = attention_fp64(module.config, state, x[row].double().numpy())
        assert np.abs(y[row].numpy() - expected).max() <= 2e-6 * np.ptp(expected)
        assert np.abs(weights[row].numpy() - strengths).max() <= 2e-6


@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_sum_to_one(settings):
    """In every row, those that read nothing but themselves among them: with a radius of 0 all of them, with causality the first."""
    spec = TINY.spec(settings)
    module = random_weights(spec, seed=2)
    _, weights = module(100 * draw(spec, 1, length=40))
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert (weights.sum(-1) - 1).abs().max() < 1e-6
    if module.config.radius == 0:
        assert torch.equal(weights, torch.eye(40).expand_as(weights))
    if module.config.causal:
        assert torch.equal(weights[:, :, 0, 0], torch.ones(2, module.config.num_heads))
        assert torch.count_nonzero(weights.triu(1)) == 0


def test_temperature():
    """Cold, a token reads the one that it interacts with most; hot, all of them alike."""
    module = random_weights(TINY.spec({"decay_length": 0.0, "radius": -1, "causal": False}), seed=3)
    x = 5 * draw(TINY.spec(), 2)
    module.temperature.fill_(1e-3)
    cold = module(x)[1]
    module.temperature.fill_(1e4)
    hot = module(x)[1]
    assert cold.max(-1).values.median() > 0.99
    assert (hot - 1 / 12).abs().max() < 1e-3


def test_published_size():
    with torch.device("meta"):
        module = MODELS["physics-attention-base"].spec().build()
    assert sum(p.numel() for p in module.parameters()) == 4 * (512 * 512 + 512) + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 5}, "got 32 and 5"),
        ({"temperature": 0.0}, "got 0.0"),
        ({"decay_length": -1.0}, "got -1.0"),
        ({"radius": -2}, "got -2"),
    ],
)
def test_contradicting_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY.config, **settings)
