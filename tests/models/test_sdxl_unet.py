"""The SDXL U-Net's own properties; the whole is compared with diffusers in `tests/parity/test_sdxl_unet.py`."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.sdxl_unet import TransformerBlock

TINY = MODELS["sdxl-unet-tiny"]


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def layer_norm(state, name, x):
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normal * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention_fp64(state, name, x, source, head_dim):
    q, k, v = (linear(state, f"{name}.to_{part}", tokens) for part, tokens in (("q", x), ("k", source), ("v", source)))
    out = np.empty_like(q)
    for start in range(0, q.shape[1], head_dim):
        head = slice(start, start + head_dim)
        scores = np.exp(q[:, head] @ k[:, head].T / math.sqrt(head_dim))
        out[:, head] = scores / scores.sum(1, keepdims=True) @ v[:, head]
    return linear(state, f"{name}.to_out.0", out)


def test_transformer_block_is_the_formula():
    torch.manual_seed(0)
    block = TransformerBlock(32, TINY.config).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    state = {name: value.double().numpy() for name, value in block.state_dict().items()}
    x, context = torch.randn(2, 6, 32), torch.randn(2, 5, 24)
    got = block(x, context)
    for i in range(2):
        h, text = x[i].double().numpy(), context[i].double().numpy()
        normed = layer_norm(state, "norm1", h)
        h = h + attention_fp64(state, "attn1", normed, normed, 16)
        h = h + attention_fp64(state, "attn2", layer_norm(state, "norm2", h), text, 16)
        value, gate = np.split(linear(state, "ff.net.0.proj", layer_norm(state, "norm3", h)), 2, axis=1)
        h = h + linear(state, "ff.net.2", value * gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))))
        assert np.abs(got[i].numpy() - h).max() <= 1e-5 * np.ptp(h)


def test_published_size():
    """The number of diffusers' UNet2DConditionModel with the published configuration; the paper speaks of 2.6 B."""
    with torch.device("meta"):
        module = MODELS["sdxl-unet-base"].spec().build()
    assert sum(p.numel() for p in module.parameters()) == 2_567_463_684


@pytest.mark.parametrize(("height", "width"), [(8, 12), (7, 5)])
def test_shapes_and_batches(height, width):
    """A size that does not halve exactly is one that the way up comes back to."""
    module = random_weights(TINY.spec(), seed=1)
    inputs = draw(TINY.spec(), batch=3, height=height, width=width, length=5)
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
    for name in ("x", "t", "context", "pooled"):
        assert (module(**inputs | {name: inputs[name] * 0.5}) - base).abs().max() > 1e-3
    for i in range(6):
        other = inputs["time_ids"].clone()
        other[0, i] = (other[0, i] + 300) % 1024
        assert (module(**inputs | {"time_ids": other}) - base).abs().max() > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"widths": (16, 30)},
        {"attention_depths": (1,)},
        {"attention_depths": (0, -1)},
        {"head_dim": 24},
        {"sample_size": 7},
        {"condition_channels": 15},
        {"layers": 0},
    ],
)
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)
