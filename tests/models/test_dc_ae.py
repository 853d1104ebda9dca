"""DC-AE's parts against fp64 formulas; the whole is compared with diffusers in `tests/parity/test_dc_ae.py`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.dc_ae import Downsample, MultiscaleAttention, RMSNorm2d, Upsample

FORMS = ["encode", "decode"]


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def conv_fp64(x, weight, groups=1):
    """A convolution with "same" padding by its definition, for x (C, H, W) and weight (O, C / groups, k, k)."""
    (_, height, width), (outputs, inputs, k, _) = x.shape, weight.shape
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = np.zeros((outputs, height, width))
    for o in range(outputs):
        first = o // (outputs // groups) * inputs
        for i in range(k):
            for j in range(k):
                out[o] += np.tensordot(weight[o, :, i, j], padded[first : first + inputs, i : i + height, j : j + width], 1)
    return out


def attention_fp64(state, x, head_dim):
    """Scores of relu(q) . relu(k) for each pair of positions, normalised, head by head and branch by branch."""
    _, height, width = x.shape
    qkv = conv_fp64(x, state["qkv.weight"])
    branches = [qkv]
    branch = 0
    while f"aggreg.{branch}.0.weight" in state:
        near = conv_fp64(qkv, state[f"aggreg.{branch}.0.weight"], groups=len(qkv))
        branches.append(conv_fp64(near, state[f"aggreg.{branch}.1.weight"], groups=len(qkv) // head_dim))
        branch += 1
    heads = []
    for channels in branches:
        for start in range(0, len(channels), 3 * head_dim):
            q, k, v = channels[start : start + 3 * head_dim].reshape(3, head_dim, -1)
            scores = np.maximum(q, 0).T @ np.maximum(k, 0)  # (queries, keys)
            heads.append(v @ (scores / (scores.sum(1, keepdims=True) + 1e-15)).T)
    out = conv_fp64(np.concatenate(heads).reshape(-1, height, width), state["proj.weight"])
    out = out / np.sqrt((out**2).mean(0) + 1e-5)
    return out * state["norm.weight"][:, None, None] + state["norm.bias"][:, None, None]


@pytest.mark.parametrize("scales", [(), (5,), (3, 5)])
def test_multiscale_attention(scales):
    torch.manual_seed(0)
    module = MultiscaleAttention(8, 4, scales).requires_grad_(False)
    torch.nn.init.normal_(module.norm.bias)
    state = {name: value.double().numpy() for name, value in module.state_dict().items()}
    x = torch.randn(2, 8, 3, 5)
    expected = np.stack([attention_fp64(state, item.double().numpy(), 4) for item in x])
    np.testing.assert_allclose(module(x).numpy(), expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_attention_is_computed_in_float32():
    """A sum of 4096 products of 16 * 16 is 2^20, past what float16 holds."""
    module = MultiscaleAttention(8, 8, ()).half().requires_grad_(False)
    module.qkv.weight.copy_(torch.eye(8).repeat(3, 1)[:, :, None, None])
    module.proj.weight.copy_(torch.eye(8)[:, :, None, None])
    module.norm = torch.nn.Identity()
    x = torch.full((1, 8, 64, 64), 16.0, dtype=torch.float16)
    assert torch.equal(module(x), x)


@pytest.mark.parametrize("widths", [(6, 6), (6, 12), (6, 24)])
def test_shortcuts(widths):
    """The one without weights is the pixel unshuffle with groups of channels averaged, and back, as the paper has it (figure 4)."""
    torch.manual_seed(0)
    narrow, wide = widths
    down, up = Downsample(narrow, wide).requires_grad_(False), Upsample(wide, narrow).requires_grad_(False)
    for module in (down, up):
        torch.nn.init.zeros_(module.conv.weight)
        torch.nn.init.zeros_(module.conv.bias)
    x = torch.randn(2, narrow, 4, 6)
    unshuffled = F.pixel_unshuffle(x, 2)
    torch.testing.assert_close(down(x), unshuffled.unflatten(1, (wide, -1)).mean(2))
    z = torch.randn(2, wide, 2, 3)
    torch.testing.assert_close(up(z), F.pixel_shuffle(z.repeat_interleave(4 * narrow // wide, dim=1), 2))


def test_rms_norm_has_a_bias():
    module = RMSNorm2d(3).requires_grad_(False)
    module.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
    module.bias.copy_(torch.tensor([0.0, 1.0, 5.0]))
    out = module(torch.tensor([3.0, 0.0, -3.0]).view(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(out, torch.tensor([1.5**0.5, 1.0, 5 + 1.5**0.5]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("form", "parameters"), [("encode", 153_027_104), ("decode", 159_223_171)])
def test_published_sizes(form, parameters):
    """The numbers of diffusers 0.42.1's AutoencoderDC with the configuration of dc-ae-f32c32-sana-1.0: 312 M together."""
    with torch.device("meta"):
        module = MODELS[f"dc-ae-{form}-f32c32-sana"].spec().build()
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert not any(buffer.is_meta for buffer in module.buffers())


@pytest.mark.parametrize("form", FORMS)
def test_shapes(form):
    spec, config = MODELS[f"dc-ae-{form}-tiny"].spec(), MODELS[f"dc-ae-{form}-tiny"].config
    module = random_weights(spec, seed=1)
    out = module(**draw(spec, batch=3, height=8, width=12))
    assert out.shape == ((3, config.latent_channels, 2, 3) if form == "encode" else (3, config.in_channels, 32, 48))
    assert out.std() > 0.05


def test_a_picture_of_no_multiple_is_padded_with_zeros():
    spec = MODELS["dc-ae-encode-tiny"].spec()
    module = random_weights(spec, seed=1)
    x = draw(spec, height=8, width=7)["x"]
    assert module(x).shape[2:] == (2, 2)
    torch.testing.assert_close(module.encoder.conv_in(x), module.encoder.conv_in(F.pad(x, (0, 1)))[..., :7])


@pytest.mark.parametrize(
    "settings",
    [
        {"widths": (8, 24, 24)},
        {"widths": (8, 16)},
        {"latent_channels": 5},
        {"head_dim": 3},
        {"scales": (4,)},
        {"attention_stages": 4},
        {"sample_size": 18},
        {"encoder_depths": (1, 0, 1)},
    ],
)
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must be"):
        dataclasses.replace(MODELS["dc-ae-encode-tiny"].config, **settings)
