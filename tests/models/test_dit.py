"""DiT against fp64 formulas, and what its registration promises. Parity with diffusers is in tests/parity."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.export import Dim, export

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights
from isthmus.models.dit import DiT, DiTConfig
from isthmus.models.layers import sincos_2d, timestep_embedding

TINY = MODELS["dit-tiny"]


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def silu(x):
    return x / (1 + np.exp(-x))


def dit_fp64(config: DiTConfig, state, x, t, y):
    """The paper's formulas for one picture, token by token and head by head, in float64."""
    p, d, grid = config.patch_size, config.hidden_size, config.input_size // config.patch_size
    angles = t * 10000.0 ** (-np.arange(128) / 128)
    c = linear(state, "t_embedder.mlp.0", np.concatenate([np.cos(angles), np.sin(angles)]))
    c = linear(state, "t_embedder.mlp.2", silu(c)) + state["y_embedder.embedding_table.weight"][y]
    kernel, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    omega = 10000.0 ** (-np.arange(d // 4) / (d // 4))
    tokens = []
    for row in range(grid):
        for column in range(grid):
            patch = x[:, row * p : row * p + p, column * p : column * p + p]
            place = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
            tokens.append((kernel * patch).sum((1, 2, 3)) + bias + np.concatenate(place))
    h = np.stack(tokens)
    for i in range(config.depth):
        b = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(state, f"{b}.adaLN_modulation.1", silu(c)), 6)
        q, k, v = np.split(linear(state, f"{b}.attn.qkv", layer_norm(h) * (1 + scale1) + shift1), 3, axis=-1)
        width, mixed = d // config.num_heads, []
        for head in range(config.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(width))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        h = h + gate1 * linear(state, f"{b}.attn.proj", np.concatenate(mixed, axis=-1))
        inner = linear(state, f"{b}.mlp.fc1", layer_norm(h) * (1 + scale2) + shift2)
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        h = h + gate2 * linear(state, f"{b}.mlp.fc2", inner)
    shift, scale = np.split(linear(state, "final_layer.adaLN_modulation.1", silu(c)), 2)
    pixels = linear(state, "final_layer.linear", layer_norm(h) * (1 + scale) + shift)
    out = np.zeros((config.out_channels, config.input_size, config.input_size))
    for n in range(grid * grid):
        row, column = divmod(n, grid)
        out[:, row * p : row * p + p, column * p : column * p + p] = pixels[n].reshape(p, p, -1).transpose(2, 0, 1)
    return out


@pytest.mark.parametrize("name", ["dit-tiny", "dit-digits"])
def test_forward_is_the_papers_formula(name):
    spec = MODELS[name].spec()
    module = random_weights(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    for seed in (0, 1):
        inputs = draw(spec, seed, batch=2)
        got = module(**inputs).double().numpy()
        for i in range(2):
            x, t, y = inputs["x"][i].double().numpy(), inputs["t"][i].item(), inputs["y"][i].item()
            expected = dit_fp64(MODELS[name].config, state, x, t, y)
            # The sine of an angle up to 1000 in float32 is off by up to 6e-5, which the condition passes on.
            assert np.abs(got[i] - expected).max() <= 3e-5 * np.ptp(expected)


@pytest.mark.parametrize(("name", "millions"), [("dit-s-2", 33), ("dit-b-2", 130), ("dit-l-2", 458), ("dit-xl-2", 675)])
def test_published_sizes(name, millions):
    """Table 1 of the paper."""
    with torch.device("meta"):
        module = MODELS[name].spec().build()
    assert round(sum(p.numel() for p in module.parameters()) / 1e6) == millions
    config = MODELS[name].config
    assert (config.input_size, config.in_channels, config.out_channels, config.num_classes) == (32, 4, 8, 1000)


def test_digits_weights_are_small():
    with torch.device("meta"):
        module = MODELS["dit-digits"].spec().build()
    assert 4 * sum(p.numel() for p in module.parameters()) < 3_000_000


def test_every_block_starts_as_the_identity():
    torch.manual_seed(0)
    module = TINY.spec().build()
    tokens, condition = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in module.blocks:
        assert torch.equal(block(tokens, condition), tokens)
    assert torch.count_nonzero(module(**draw(TINY.spec()))) == 0


def test_a_batch_is_its_items():
    module = random_weights(TINY.spec(), seed=2)
    inputs = draw(TINY.spec(), batch=3)
    together = module(**inputs)
    for i in range(3):
        alone = module(**{name: value[i : i + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-5, atol=1e-6)


def test_every_input_matters():
    module = random_weights(TINY.spec(), seed=2)
    inputs = draw(TINY.spec(), batch=1) | {"y": torch.tensor([3])}
    base = module(**inputs)
    for other in ({"x": inputs["x"].flip(-1)}, {"t": inputs["t"] / 2}, {"y": torch.tensor([10])}):
        assert (module(**inputs | other) - base).abs().max() > 1e-3


def test_built_on_the_meta_device_it_keeps_its_position_table():
    with torch.device("meta"):
        module = TINY.spec().build()
    assert module.x_embedder.proj.weight.is_meta
    assert torch.equal(module.pos_embed, TINY.spec().build().pos_embed)
    assert "pos_embed" not in module.state_dict()


@pytest.mark.parametrize("name", ["dit-tiny", "dit-digits"])
def test_torch_export_with_a_free_batch(name):
    spec = MODELS[name].spec()
    module = random_weights(spec, seed=3)
    dims = {size: Dim(size, min=r.min, max=r.max) for size, r in spec.ranges.items()}
    shapes = {key: {axis: dims[size] for axis, size in axes.items()} for key, axes in spec.dynamic.items()}
    program = export(module, (), kwargs=draw(spec), dynamic_shapes=shapes)
    for batch in (spec.ranges["batch"].min, spec.ranges["batch"].max):
        inputs = draw(spec, 1, batch=batch)
        torch.testing.assert_close(program.module()(**inputs), module(**inputs), rtol=1e-5, atol=1e-6)


def test_authors_layout(tmp_path):
    from safetensors.torch import save_file

    spec = TINY.spec()
    source = random_weights(spec, seed=4)
    save_file(source.state_dict() | {"pos_embed": source.pos_embed}, tmp_path / "a.safetensors")
    module = spec.build()
    assert load_weights(module, tmp_path / "a.safetensors", spec.layouts).layout == "facebookresearch/DiT"
    inputs = draw(spec)
    assert torch.equal(module(**inputs), source(**inputs))
    save_file(source.state_dict() | {"pos_embed": torch.zeros(1, 64, 32)}, tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match="0 missing, 0 mismatched, 1 unexpected"):
        load_weights(spec.build(), tmp_path / "b.safetensors", spec.layouts)


@pytest.mark.parametrize("settings", [{"patch_size": 3}, {"num_heads": 5}, {"hidden_size": 6, "num_heads": 2}, {"depth": 0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must be"):
        dataclasses.replace(TINY.config, **settings)


def test_without_learned_sigma():
    module = DiT(dataclasses.replace(TINY.config, learn_sigma=False))
    assert module(**draw(TINY.spec())).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_embedding(shift):
    t = torch.tensor([0.0, 0.5, 17.0, 999.0])
    angles = t.double().numpy()[:, None] * 10000.0 ** (-np.arange(8) / (8 - shift))
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(timestep_embedding(t, 16, frequency_shift=shift).numpy(), expected, rtol=0, atol=1e-4)
    assert timestep_embedding(t.half(), 16).dtype == torch.float32


def test_position_table_of_an_oblong():
    table = sincos_2d(8, 2, 3).numpy()
    omega = np.array([1.0, 0.01])
    for row in range(2):
        for column in range(3):
            expected = np.concatenate([np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)])
            np.testing.assert_allclose(table[3 * row + column], expected, atol=1e-7)
