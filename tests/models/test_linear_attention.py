"""The linear transformer against its formulas in float64, token by token, and its three forms against each other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.linear_attention import features

TINY, STEP, FULL = (MODELS[f"linear-attention-{name}"] for name in ("tiny", "step-tiny", "full-tiny"))


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(state, name, x):
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normed * state[f"{name}.weight"] + state[f"{name}.bias"]


def phi(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def transformer_fp64(config, state, x, sums=None):
    """The network on one sequence (L, D), reading all tokens (`sums` None) or those before, from the sums of earlier ones."""
    after = []
    for i in range(config.depth):
        parts = [linear(state, f"layers.{i}.attention.{n}_projection", x) for n in ("query", "key", "value")]
        q, k, v = (part.reshape(len(x), config.num_heads, -1) for part in parts)
        y = np.zeros_like(v)
        for head in range(config.num_heads):
            values, keys = (np.zeros((config.head_dim, config.head_dim)), np.zeros(config.head_dim))
            if sums is not None:
                values, keys = sums[i, head, :, :-1].copy(), sums[i, head, :, -1].copy()
            for n in range(len(x)):
                values += np.outer(phi(k[n, head]), v[n, head])
                keys += phi(k[n, head])
                if sums is not None:
                    y[n, head] = phi(q[n, head]) @ values / (phi(q[n, head]) @ keys + config.eps)
            if sums is None:
                y[:, head] = phi(q[:, head]) @ values / (phi(q[:, head]) @ keys + config.eps)[:, None]
            after.append(np.concatenate([values, keys[:, None]], axis=1))
        x = layer_norm(state, f"layers.{i}.norm1", x + linear(state, f"layers.{i}.attention.out_projection", y.reshape(len(x), -1)))
        hidden = np.maximum(linear(state, f"layers.{i}.linear1", x), 0)
        x = layer_norm(state, f"layers.{i}.norm2", x + linear(state, f"layers.{i}.linear2", hidden))
    return layer_norm(state, "norm", x), np.stack(after).reshape(config.depth, config.num_heads, config.head_dim, -1)


@pytest.mark.parametrize("entry", [TINY, FULL])
@pytest.mark.parametrize("length", [1, 70])
def test_forward_is_the_formula(entry, length):
    spec = entry.spec({"eps": 1e-3})  # large enough to be seen
    module = random_weights(spec, seed=1)
    state = {name: value.double().numpy() for name, value in module.state_dict().items()}
    inputs = draw(spec, length=length)
    got = module(**inputs)
    y, last = got if entry is TINY else (got, None)
    for row in range(2):
        sums = inputs["state"][row].double().numpy() if entry is TINY else None
        expected, after = transformer_fp64(module.config, state, inputs["x"][row].double().numpy(), sums)
        assert np.abs(y[row].numpy() - expected).max() <= 2e-6 * np.ptp(expected)
        if last is not None:
            assert np.abs(last[row].numpy() - after).max() <= 2e-6 * np.ptp(after)


def test_step_by_step_is_the_sequence():
    """And a sequence from a carried state is the rest of a longer one."""
    whole, step = random_weights(TINY.spec(), seed=2), random_weights(STEP.spec(), seed=2)
    step.load_state_dict(whole.state_dict())
    x = draw(TINY.spec(), length=50)["x"]
    nothing = torch.zeros_like(draw(TINY.spec())["state"])
    y, last = whole(x, nothing)
    state, outputs = nothing, []
    for token in x.unbind(1):
        out, state = step(token, state)
        outputs.append(out)
    first, between = whole(x[:, :23], nothing)
    second, again = whole(x[:, 23:], between)
    for got, expected in (
        (torch.stack(outputs, 1), y), (state, last), (torch.cat([first, second], 1), y), (again, last),
    ):  # fmt: skip
        assert (got - expected).abs().max() <= 2e-6 * (expected.max() - expected.min())


def test_the_last_token_is_the_same_with_and_without_the_mask():
    """In one layer, where the tokens before it hand on nothing of what they may see."""
    causal, full = (random_weights(entry.spec({"depth": 1}), seed=3) for entry in (TINY, FULL))
    full.load_state_dict(causal.state_dict())
    inputs = draw(TINY.spec({"depth": 1}))
    y, _ = causal(inputs["x"], torch.zeros_like(inputs["state"]))
    everything = full(inputs["x"])
    assert (everything[:, -1] - y[:, -1]).abs().max() <= 2e-6 * (y.max() - y.min())
    assert (everything[:, 0] - y[:, 0]).abs().max() > 1e-2


def test_features_keep_their_digits():
    x = torch.tensor([-60.0, -20.0, -1.0, 0.0, 3.0])
    expected = phi(x.double().numpy())
    assert np.abs(features(x).double().numpy() / expected - 1).max() < 1e-6
    assert (torch.nn.functional.elu(x) + 1)[1] == 0


def test_published_sizes():
    """The paper gives 8 layers for MNIST and 16 for CIFAR-10, each of 8 heads of 32 and a feed-forward layer of 4 times the width."""
    for name, depth in (("mnist", 8), ("cifar10", 16)):
        with torch.device("meta"):
            module = MODELS[f"linear-attention-{name}"].spec().build()
        layer = 4 * (256 * 256 + 256) + 2 * 256 * 1024 + 1024 + 256 + 4 * 256
        assert sum(p.numel() for p in module.parameters()) == depth * layer + 2 * 256
        assert MODELS[f"linear-attention-step-{name}"].config == dataclasses.replace(module.config, form="step")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"depth": 0}, "depth must be at least 1, got 0"), ({"eps": -1.0}, "got -1"), ({"form": "causal"}, "got 'causal'")],
)
def test_contradicting_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TINY.spec(settings)
