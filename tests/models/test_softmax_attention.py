"""Softmax attention against its formula in float64, head by head and token by token, and the step against the sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights

TINY, STEP, FULL = (MODELS[f"softmax-attention-{name}"] for name in ("tiny", "step-tiny", "full-tiny"))


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def project(config, state, name, x, heads):
    y = x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)
    return y.reshape(len(x), heads, config.head_dim)


def turned(config, x, position):
    """One head's vector as complex numbers, channel i with channel i + d / 2, turned by its position."""
    if not config.rope_base:
        return x
    half = config.head_dim // 2
    turns = np.exp(1j * position * config.rope_base ** (-np.arange(half) / half))
    z = (x[:half] + 1j * x[half:]) * turns
    return np.concatenate([z.real, z.imag])


def attention_fp64(config, state, x):
    """The formula for one sequence (L, D); also its keys (kv heads, L, d)."""
    q = project(config, state, "q_proj", x, config.num_heads)
    k, v = (project(config, state, name, x, config.num_kv_heads) for name in ("k_proj", "v_proj"))
    out, keys = np.zeros_like(q), np.zeros_like(k)
    for head in range(config.num_heads):
        shared = head * config.num_kv_heads // config.num_heads
        for n in range(len(x)):
            seen = range(n + 1 if config.causal else len(x))
            scores = [turned(config, q[n, head], n) @ turned(config, k[m, shared], m) / np.sqrt(config.head_dim) for m in seen]
            weights = np.exp(scores) / np.exp(scores).sum()
            out[n, head] = sum(w * v[m, shared] for w, m in zip(weights, seen, strict=True))
            keys[n, shared] = turned(config, k[n, shared], n)
    return out.reshape(len(x), -1) @ state["o_proj.weight"].T + state.get("o_proj.bias", 0), keys.swapaxes(0, 1)


@pytest.mark.parametrize(
    ("entry", "settings"),
    [(TINY, {}), (TINY, {"num_kv_heads": 4, "bias": True, "rope_base": 0.0}), (TINY, {"causal": False, "num_kv_heads": 1}), (FULL, {})],
)
@pytest.mark.parametrize("length", [1, 9])
def test_forward_is_the_formula(entry, settings, length):
    spec = entry.spec(settings)
    module = random_weights(spec, seed=1)
    config = module.config
    state = {name: value.double().numpy() for name, value in module.state_dict().items()}
    x = draw(spec, length=length)["x"]
    y, *cache = module(x) if config.causal else (module(x),)
    for row in range(len(x)):
        expected, keys = attention_fp64(config, state, x[row].double().numpy())
        assert np.abs(y[row].numpy() - expected).max() <= 1e-6 * max(1, np.ptp(expected))
        if cache:
            assert np.abs(cache[0][row].numpy() - keys).max() <= 2e-6 * np.ptp(keys)


@pytest.mark.parametrize("settings", [{}, {"rope_base": 0.0, "num_kv_heads": 4}])
def test_step_by_step_is_the_sequence(settings):
    whole, step = random_weights(TINY.spec(settings), seed=3), random_weights(STEP.spec(settings), seed=3)
    step.load_state_dict(whole.state_dict())
    x = draw(TINY.spec(settings), length=40)["x"]
    y, keys, values = whole(x)
    for start in (0, 25):  # from an empty cache, and from a prefill's
        mine = keys[:, :, :start], values[:, :, :start]
        outputs = []
        for token in x[:, start:].unbind(1):
            out, *mine = step(token, *mine)
            outputs.append(out)
        for got, expected in ((torch.stack(outputs, 1), y[:, start:]), (mine[0], keys), (mine[1], values)):
            assert (got - expected).abs().max() <= 1e-6 * (expected.max() - expected.min())


def test_positions_are_relative():
    """In float64, because the table holds float32: the same tokens, all moved by 50 places, read each other alike."""
    module = random_weights(TINY.spec(), seed=4).double()
    x = draw(TINY.spec())["x"].double()
    here = [module.project(x, start, start + x.shape[1]) for start in (0, 50)]
    near, far = (module.attend(*parts, causal=True) for parts in here)
    assert not torch.allclose(here[0][0], here[1][0], atol=0.1)
    assert (near - far).abs().max() <= 1e-5


def test_published_sizes():
    with torch.device("meta"):
        llama = MODELS["softmax-attention-llama3-8b"].spec().build()
        base = MODELS["softmax-attention-transformer-base"].spec().build()
    assert sum(p.numel() for p in llama.parameters()) == 2 * 4096 * 4096 + 2 * 4096 * 1024
    assert sum(p.numel() for p in base.parameters()) == 4 * 512 * 512
    assert not llama.cos.is_meta


@pytest.mark.parametrize(
    ("entry", "settings", "message"),
    [
        (TINY, {"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        (TINY, {"head_dim": 7}, "got rope_base=10000.0, head_dim=7"),
        (TINY, {"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        (TINY, {"form": "decode"}, "got 'decode'"),
        (TINY, {"max_length": 4}, "at least 8"),
        (STEP, {"causal": False}, "must have causal=True"),
    ],
)
def test_contradicting_settings(entry, settings, message):
    with pytest.raises(ValueError, match=message):
        entry.spec(settings)
