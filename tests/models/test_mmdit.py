"""MMDiT's own properties; the whole is compared with diffusers in `tests/parity/test_mmdit.py`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.mmdit import JointBlock, position_table

TINY = MODELS["mmdit-tiny"]
X = {"qk_norm": True, "dual_layers": 1}


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def heads_fp64(state, name, x, num_heads):
    """Queries, keys and values of x (N, D), each (heads, N, D / heads), with their norms where there are any."""
    q, k, v = (part.reshape(len(x), num_heads, -1).swapaxes(0, 1) for part in np.split(linear(state, f"{name}.qkv", x), 3, axis=1))
    if f"{name}.ln_q.weight" in state:
        q, k = (
            part / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-6) * state[f"{name}.{norm}.weight"]
            for part, norm in ((q, "ln_q"), (k, "ln_k"))
        )
    return q, k, v


def softmax_attention(q, k, v):
    scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
    return (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(q.shape[1], -1)


def block_fp64(state, context, x, c, num_heads, *, last, dual):
    """Figure 2b of the paper for one picture: text (L, D), picture (N, D), condition (D,), in float64."""
    dim = len(c)
    silu = c / (1 + np.exp(-c))
    both = {}
    for stream, tokens in (("context_block", context), ("x_block", x)):
        mods = linear(state, f"{stream}.adaLN_modulation.1", silu).reshape(-1, dim)
        both[stream] = tokens, mods, heads_fp64(state, f"{stream}.attn", layer_norm(tokens) * (1 + mods[1]) + mods[0], num_heads)
    q, k, v = (np.concatenate([both["context_block"][2][i], both["x_block"][2][i]], axis=1) for i in range(3))
    attended = softmax_attention(q, k, v)
    out = {}
    for stream, part in (("context_block", attended[: len(context)]), ("x_block", attended[len(context) :])):
        tokens, mods, _ = both[stream]
        if stream == "context_block" and last:
            out[stream] = tokens
            continue
        y = tokens + mods[2] * linear(state, f"{stream}.attn.proj", part)
        if stream == "x_block" and dual:
            own = softmax_attention(*heads_fp64(state, "x_block.attn2", layer_norm(tokens) * (1 + mods[7]) + mods[6], num_heads))
            y = y + mods[8] * linear(state, "x_block.attn2.proj", own)
        hidden = linear(state, f"{stream}.mlp.fc1", layer_norm(y) * (1 + mods[4]) + mods[3])
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        out[stream] = y + mods[5] * linear(state, f"{stream}.mlp.fc2", hidden)
    return out["context_block"], out["x_block"]


@pytest.mark.parametrize("settings", [{}, X])
@pytest.mark.parametrize("index", [0, 1])
def test_block_is_the_formula(settings, index):
    config = dataclasses.replace(TINY.config, **settings)
    torch.manual_seed(0)
    block = JointBlock(config, index).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if "ln_" in name:
            parameter.uniform_(0.5, 1.5)
    state = {name: value.double().numpy() for name, value in block.state_dict().items()}
    context, x, c = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 32)
    got = block(context, x, c)
    for i in range(2):
        expected = block_fp64(
            state,
            *(value[i].double().numpy() for value in (context, x, c)),
            config.num_heads,
            last=index == config.depth - 1,
            dual=index < config.dual_layers,
        )
        for ours, theirs in zip(got, expected, strict=True):
            assert np.abs(ours[i].numpy() - theirs).max() <= 1e-5 * np.ptp(theirs)


@pytest.mark.parametrize(("name", "parameters"), [("mmdit-sd3-medium", 2_028_328_000), ("mmdit-sd3.5-medium", 2_243_171_520)])
def test_published_sizes(name, parameters):
    """The numbers of diffusers 0.42.1's SD3Transformer2DModel with the published configurations; the paper speaks of 2 B and 2.5 B,
    which is with the table of positions."""
    with torch.device("meta"):
        module = MODELS[name].spec().build()
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_the_middle_of_the_table():
    module = random_weights(TINY.spec(), seed=0)
    table = position_table(32, 12, 4).view(12, 12, 32)
    assert torch.equal(module._positions(4, 5), table[4:8, 3:8])
    assert torch.equal(module._positions(12, 1), table[:, 5:6])
    frequency = 10000.0 ** (-1 / 8)
    torch.testing.assert_close(table[7, 3, 1].item(), np.sin(3 / 3 * frequency))  # the first half of the channels is the column's
    torch.testing.assert_close(table[7, 3, 25].item(), np.cos(7 / 3 * frequency))


@pytest.mark.parametrize("settings", [{}, X])
def test_shapes_and_batches(settings):
    spec = TINY.spec(settings)
    module = random_weights(spec, seed=1)
    inputs = draw(spec, batch=3, height=10, width=6, length=5)
    out = module(**inputs)
    assert out.shape == inputs["x"].shape
    for i in range(3):
        torch.testing.assert_close(
            module(**{name: value[i : i + 1] for name, value in inputs.items()}), out[i : i + 1], rtol=1e-5, atol=1e-5
        )


def test_every_input_matters():
    module = random_weights(TINY.spec(), seed=2)
    inputs = draw(TINY.spec(), batch=1)
    base = module(**inputs)
    for name in inputs:
        assert (module(**inputs | {name: inputs[name] * 0.5}) - base).abs().max() > 1e-3
    torch.testing.assert_close(
        module(**inputs | {"context": inputs["context"].flip(1)}), base, rtol=1e-5, atol=1e-5
    )  # text has no positions
    assert (module(**inputs | {"x": inputs["x"].flip(3)}).flip(3) - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings", [{"sample_size": 7}, {"num_heads": 3}, {"pos_table": 3}, {"dual_layers": 2}, {"depth": 0}, {"hidden_size": 30}]
)
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)
