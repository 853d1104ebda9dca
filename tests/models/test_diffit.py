"""DiffiT against its formulas in float64, written here apart from the model."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights
from isthmus.models.diffit import DiffiTConfig, offsets

TINY = MODELS["diffit-tiny"]


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def position(dim, row, column):
    """The column in the first half of the channels, the row in the second; sines, then cosines."""
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    return np.concatenate([f(place * frequencies) for place in (column, row) for f in (np.sin, np.cos)])


def oracle(w, config, x, t, y):
    """One picture: x (C, H, W), t and y numbers. Attention runs over pairs of patches in loops."""
    p, grid, dim, heads = config.patch_size, config.input_size // config.patch_size, config.hidden_size, config.num_heads
    places = [(i, j) for i in range(grid) for j in range(grid)]
    kernel = w["x_embedder.proj.weight"].reshape(dim, -1)
    tokens = np.stack(
        [kernel @ x[:, i * p : i * p + p, j * p : j * p + p].ravel() + w["x_embedder.proj.bias"] + position(dim, i, j) for i, j in places]
    )
    angles = t * np.exp(-math.log(10000.0) * np.arange(128) / 128)
    h = silu(w["t_embedder.mlp.0.weight"] @ np.concatenate([np.cos(angles), np.sin(angles)]) + w["t_embedder.mlp.0.bias"])
    c = w["t_embedder.mlp.2.weight"] @ h + w["t_embedder.mlp.2.bias"] + w["y_embedder.embedding_table.weight"][y]
    for block in range(config.depth):
        b = f"blocks.{block}."
        table = w[b + "attn.relative_position_bias_table"]
        qkv = norm(tokens) @ w[b + "attn.qkv.weight"].T + w[b + "attn.qkv.bias"]
        qkv = qkv + w[b + "attn.qkv_temb.weight"] @ c + w[b + "attn.qkv_temb.bias"]
        q, k, v = (part.reshape(len(places), heads, -1) for part in np.split(qkv, 3, axis=1))
        mixed = np.zeros_like(q)
        for head in range(heads):
            for a, (ai, aj) in enumerate(places):
                scores = np.array(
                    [
                        q[a, head] @ k[o, head] / math.sqrt(dim / heads)
                        + table[(ai - oi + grid - 1) * (2 * grid - 1) + (aj - oj + grid - 1), head]
                        for o, (oi, oj) in enumerate(places)
                    ]
                )
                weights = np.exp(scores - scores.max())
                mixed[a, head] = weights / weights.sum() @ v[:, head]
        tokens = tokens + mixed.reshape(len(places), dim) @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        inner = gelu_tanh(norm(tokens) @ w[b + "mlp.fc1.weight"].T + w[b + "mlp.fc1.bias"])
        tokens = tokens + inner @ w[b + "mlp.fc2.weight"].T + w[b + "mlp.fc2.bias"]
    pixels = silu(norm(tokens)) @ w["final_layer.linear.weight"].T + w["final_layer.linear.bias"]
    channels = config.in_channels * 2
    out = np.zeros((channels, grid * p, grid * p))
    for (i, j), row in zip(places, pixels, strict=True):
        out[:, i * p : i * p + p, j * p : j * p + p] = row.reshape(p, p, channels).transpose(2, 0, 1)
    return out


@pytest.mark.parametrize("seed", [0, 1])
def test_the_formulas_in_float64(seed):
    spec = TINY.spec()
    module = random_weights(spec, seed=seed)
    inputs = spec.inputs(np.random.Generator(np.random.PCG64(seed)), {"batch": 2})
    with torch.no_grad():
        got = module(**inputs).double().numpy()
    weights = {name: value.double().numpy() for name, value in module.state_dict().items()}
    for row in range(2):
        expected = oracle(
            weights, TINY.config, *(value[row].double().numpy() for value in (inputs["x"], inputs["t"])), int(inputs["y"][row])
        )
        assert np.abs(got[row] - expected).max() <= 1e-5 * np.ptp(expected)


def test_the_time_reaches_the_output_through_attention_alone():
    spec = TINY.spec()
    module = random_weights(spec, seed=0)
    inputs = spec.inputs(np.random.Generator(np.random.PCG64(0)), {"batch": 2})
    with torch.no_grad():
        first = module(**inputs)
        assert (module(**{**inputs, "t": inputs["t"] + 100}) - first).abs().max() > 1e-3 * first.abs().max()
        for block in module.blocks:
            block.attn.qkv_temb.weight.zero_()
        assert torch.equal(module(**{**inputs, "t": inputs["t"] + 100}), module(**inputs))


def test_offsets_of_two_by_two_patches():
    # Rows: patches (0,0), (0,1), (1,0), (1,1); an offset (dy, dx) has number 3 (dy + 1) + dx + 1.
    assert offsets(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_the_published_size():
    """The released code has 30 blocks; the paper's 16.88 % less than DiT-XL/2 (section 4.3) is what 28 have."""

    def count(name, **settings):
        with torch.device("meta"):
            return sum(p.numel() for p in MODELS[name].spec(settings).build().parameters())

    assert round(count("diffit-xl-2") / 1e6) == 601
    assert count("diffit-xl-2", depth=28) / count("dit-xl-2") == pytest.approx(1 - 0.1688, abs=5e-4)


def test_weights_in_the_authors_layout(tmp_path):
    spec = TINY.spec()
    module = random_weights(spec, seed=3)
    tables = {"pos_embed": module.pos_embed.clone()}
    tables |= {f"blocks.{i}.attn.relative_position_index": offsets(4) for i in range(2)}
    save_file({**module.state_dict(), **tables}, tmp_path / "w.safetensors")
    with torch.device("meta"):
        loaded = spec.build()
    assert load_weights(loaded, tmp_path / "w.safetensors", spec.layouts).layout == "NVlabs/DiffiT"
    inputs = spec.inputs(np.random.Generator(np.random.PCG64(0)), {"batch": 2})
    with torch.no_grad():
        assert torch.equal(loaded(**inputs), module(**inputs))


@pytest.mark.parametrize(("settings", "message"), [({"input_size": 7}, "multiple of patch_size"), ({"num_heads": 5}, "num_heads")])
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffiTConfig(**settings)
