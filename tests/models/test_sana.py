"""SANA against fp64 formulas, and what its registration promises. Parity with diffusers is in tests/parity."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.export import Dim, export

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.sana import DIGIT_NAMES, LinearAttention, MixFFN, spell

TINY = MODELS["sana-tiny"]


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def weights_of(module):
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def linear_attention_fp64(state, x, head_dim):
    """relu(q) . relu(k) as N x N weights, normalised: the quadratic form of the same attention, for one sequence x (N, D)."""
    q, k, v = np.split(x @ state["qkv.weight"].T, 3, axis=-1)
    out = np.zeros_like(x)
    for start in range(0, x.shape[1], head_dim):
        head = slice(start, start + head_dim)
        for n in range(len(x)):
            scores = np.array([np.maximum(q[n, head], 0) @ np.maximum(k[m, head], 0) for m in range(len(x))])
            out[n, head] = scores @ v[:, head] / (scores.sum() + 1e-15)
    return out @ state["proj.weight"].T + state["proj.bias"]


def mix_ffn_fp64(state, x, height, width):
    """Expansion, 3x3 depthwise convolution by its definition, gate, projection, for one sequence x (height * width, D)."""

    def silu(a):
        return a / (1 + np.exp(-a))

    hidden = silu(x @ state["inverted_conv.weight"][:, :, 0, 0].T + state["inverted_conv.bias"]).reshape(height, width, -1)
    out = np.tile(state["depth_conv.bias"], (height, width, 1))
    for row in range(height):
        for column in range(width):
            for i in range(3):
                for j in range(3):
                    if 0 <= row + i - 1 < height and 0 <= column + j - 1 < width:
                        out[row, column] += state["depth_conv.weight"][:, 0, i, j] * hidden[row + i - 1, column + j - 1]
    value, gate = np.split(out.reshape(height * width, -1), 2, axis=-1)
    return (value * silu(gate)) @ state["point_conv.weight"][:, :, 0, 0].T


def test_linear_attention():
    torch.manual_seed(0)
    module = LinearAttention(12, head_dim=4).requires_grad_(False)
    x = torch.randn(2, 9, 12)
    expected = np.stack([linear_attention_fp64(weights_of(module), item.double().numpy(), 4) for item in x])
    np.testing.assert_allclose(module(x).numpy(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_linear_attention_where_no_channel_is_positive():
    """All scores are 0: the epsilon makes 0 of it, where 0 / 0 would be NaN."""
    module = LinearAttention(8, head_dim=4).requires_grad_(False)
    torch.nn.init.ones_(module.qkv.weight)
    assert torch.equal(module(-torch.ones(1, 5, 8)), module.proj.bias.expand(1, 5, 8))


def test_linear_attention_is_computed_in_float32():
    """A sum of 4096 products of 16 * 16 is 2^20, past what float16 holds."""
    module = LinearAttention(8, head_dim=8).half().requires_grad_(False)
    torch.nn.init.eye_(module.qkv.weight[:8])
    torch.nn.init.eye_(module.qkv.weight[8:16])
    torch.nn.init.eye_(module.qkv.weight[16:])
    torch.nn.init.eye_(module.proj.weight)
    torch.nn.init.zeros_(module.proj.bias)
    x = torch.full((1, 4096, 8), 16.0, dtype=torch.float16)
    assert torch.equal(module(x), x)


def test_mix_ffn():
    torch.manual_seed(1)
    module = MixFFN(6, 15).requires_grad_(False)
    x = torch.randn(2, 4 * 3, 6)
    expected = np.stack([mix_ffn_fp64(weights_of(module), item.double().numpy(), 4, 3) for item in x])
    np.testing.assert_allclose(module(x, 4, 3).numpy(), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "parameters"), [("sana-600m", 591_747_872), ("sana-1.6b", 1_604_462_752)])
def test_published_sizes(name, parameters):
    """The numbers of diffusers 0.42.1's SanaTransformer2DModel with the published configurations."""
    with torch.device("meta"):
        module = MODELS[name].spec().build()
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert not any(buffer.is_meta for buffer in module.buffers())


def test_digits_weights_are_small():
    with torch.device("meta"):
        module = MODELS["sana-digits"].spec().build()
    assert 4 * sum(p.numel() for p in module.parameters()) < 3_000_000


def test_a_batch_is_its_items():
    module = random_weights(TINY.spec(), seed=2)
    inputs = draw(TINY.spec(), batch=3)
    together = module(**inputs)
    for i in range(3):
        alone = module(**{name: value[i : i + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-5, atol=1e-5)


def test_every_input_matters():
    module = random_weights(TINY.spec(), seed=2)
    inputs = draw(TINY.spec(), batch=1, length=5) | {"mask": torch.ones(1, 5, dtype=torch.int64)}
    base = module(**inputs)
    fewer = torch.tensor([[1, 1, 1, 0, 0]])
    for other in ({"x": inputs["x"].flip(-1)}, {"t": inputs["t"] + 10}, {"caption": -inputs["caption"]}, {"mask": fewer}):
        assert (module(**inputs | other) - base).abs().max() > 1e-3


def test_masked_tokens_are_as_if_absent():
    module = random_weights(TINY.spec(), seed=2)
    inputs = draw(TINY.spec(), batch=1, length=6) | {"mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}
    shorter = inputs | {"caption": inputs["caption"][:, :4], "mask": inputs["mask"][:, :4]}
    torch.testing.assert_close(module(**inputs), module(**shorter), rtol=1e-5, atol=1e-5)
    without = {name: value for name, value in shorter.items() if name != "mask"}
    torch.testing.assert_close(module(**without), module(**shorter), rtol=1e-5, atol=1e-5)


def test_no_position_embedding():
    """Seen through the parts without convolution: attention and cross-attention permute with their tokens."""
    module = random_weights(TINY.spec(), seed=3)
    attention, order = module.blocks[0].attn, torch.randperm(9, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attention(tokens[:, order]), attention(tokens)[:, order], rtol=1e-5, atol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "settings"), [("sana-tiny", {}), ("sana-digits", {}), ("sana-tiny", {"patch_size": 2})])
def test_torch_export_with_free_sizes(name, settings):
    spec = MODELS[name].spec(settings)
    module = random_weights(spec, seed=3)
    dims = {size: Dim(size, min=r.min, max=r.max) for size, r in spec.ranges.items()}
    shapes = {key: {axis: dims[size] for axis, size in axes.items()} for key, axes in spec.dynamic.items()}
    program = export(module, (), kwargs=draw(spec), dynamic_shapes=shapes)
    smallest = {size: r.min for size, r in spec.ranges.items()}
    largest = {size: r.max for size, r in spec.ranges.items()}
    free = {"batch", "length"} if settings else {"batch", "length", "height", "width"}
    assert set(spec.ranges) == free
    for sizes in (smallest, largest | {"batch": 2}, smallest | {"batch": 3} | ({} if settings else {"height": 6, "width": 11})):
        inputs = draw(spec, 1, **sizes)
        expected = module(**inputs)
        assert expected.shape == inputs["x"].shape
        torch.testing.assert_close(program.module()(**inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"patch_size": 3}, {"head_dim": 5}, {"num_cross_heads": 3}, {"depth": 0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must be"):
        dataclasses.replace(TINY.config, **settings)


def test_spell():
    captions = spell(np.arange(11))
    assert captions.shape == (11, 5, 27)
    assert captions.dtype == np.float32
    assert np.array_equal(captions.sum(-1), np.ones((11, 5)))
    letters = "abcdefghijklmnopqrstuvwxyz "
    read = ["".join(letters[i] for i in caption.argmax(-1)).rstrip() for caption in captions]
    assert read == ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", ""]
    assert read == list(DIGIT_NAMES)
    # Cross-attention does not see the order of the tokens, so the captions must differ as bags of letters.
    assert len(np.unique(captions.sum(1), axis=0)) == 11
    assert spell([]).shape == (0, 5, 27)
