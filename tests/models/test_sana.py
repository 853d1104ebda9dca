"""SANA against fp64 formulas, and what its registration promises. Parity with diffusers is in tests/parity."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.export import Dim, export

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights
from isthmus.models.sana import DIGIT_NAMES, LinearAttention, MixFFN, PositionEmbedding, spell

TINY = MODELS["sana-tiny"]


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def positions_fp64(config, height, width):
    """What is added to each token of a picture, (tokens, D): the definition, token by token; zeros without a position embedding."""
    rows, columns, quarter = height // config.patch_size, width // config.patch_size, config.hidden_size // 4
    out = np.zeros((rows * columns, config.hidden_size))
    if config.position_scale:
        base = config.sample_size // config.patch_size
        frequencies = [10000.0 ** (-i / quarter) for i in range(quarter)]
        for row in range(rows):
            for column in range(columns):
                places = column / (columns / base) / config.position_scale, row / (rows / base) / config.position_scale
                out[row * columns + column] = [f(p * w) for p in places for f in (np.sin, np.cos) for w in frequencies]
    return out


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


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sana-600m", 591_747_872),
        ("sana-1.6b", 1_604_462_752),
        ("sana-1.6b-2k", 1_604_462_752),
        ("sana-1.6b-4k", 1_604_462_752),
    ],
)
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


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 6), (2, 4)])
def test_the_position_embedding(height, width):
    config = dataclasses.replace(TINY.config, patch_size=2, position_scale=2.0)
    got = PositionEmbedding(config).half()(height // 2, width // 2)  # has nothing that could lose bits
    np.testing.assert_allclose(got.numpy(), positions_fp64(config, height, width), rtol=0, atol=1e-6)


def test_the_positions_are_added_to_the_tokens():
    """A model whose patches are embedded to zeros sees the positions alone."""
    spec = TINY.spec({"position_scale": 1.0})
    module, inputs = random_weights(spec, seed=2), draw(spec, batch=1)
    seen = []
    module.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    torch.nn.init.zeros_(module.x_embedder.proj.weight)
    torch.nn.init.zeros_(module.x_embedder.proj.bias)
    module(**inputs)
    expected = positions_fp64(dataclasses.replace(TINY.config, position_scale=1.0), 8, 8)
    np.testing.assert_allclose(seen[0][0].numpy(), expected, rtol=0, atol=1e-6)


def test_no_position_embedding():
    """Seen through the parts without convolution: attention and cross-attention permute with their tokens."""
    module = random_weights(TINY.spec(), seed=3)
    attention, order = module.blocks[0].attn, torch.randperm(9, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attention(tokens[:, order]), attention(tokens)[:, order], rtol=1e-5, atol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sana-tiny", {}),
        ("sana-digits", {}),
        ("sana-tiny", {"patch_size": 2}),
        ("sana-tiny", {"position_scale": 2.0}),
    ],
)
def test_torch_export_with_free_sizes(name, settings):
    spec = MODELS[name].spec(settings)
    module = random_weights(spec, seed=3)
    dims = {size: Dim(size, min=r.min, max=r.max) for size, r in spec.ranges.items()}
    shapes = {key: {axis: dims[size] for axis, size in axes.items()} for key, axes in spec.dynamic.items()}
    program = export(module, (), kwargs=draw(spec), dynamic_shapes=shapes)
    smallest = {size: r.min for size, r in spec.ranges.items()}
    largest = {size: r.max for size, r in spec.ranges.items()}
    patched = "patch_size" in settings
    free = {"batch", "length"} if patched else {"batch", "length", "height", "width"}
    assert set(spec.ranges) == free
    for sizes in (smallest, largest | {"batch": 2}, smallest | {"batch": 3} | ({} if patched else {"height": 6, "width": 11})):
        inputs = draw(spec, 1, **sizes)
        expected = module(**inputs)
        assert expected.shape == inputs["x"].shape
        torch.testing.assert_close(program.module()(**inputs), expected, rtol=1e-5, atol=1e-5)


CONVERTED = """
    x_embedder.proj.weight x_embedder.proj.bias y_embedder.y_proj.fc1.weight y_embedder.y_proj.fc1.bias y_embedder.y_proj.fc2.weight
    y_embedder.y_proj.fc2.bias t_embedder.mlp.0.weight t_embedder.mlp.0.bias t_embedder.mlp.2.weight t_embedder.mlp.2.bias t_block.1.weight
    t_block.1.bias attention_y_norm.weight final_layer.linear.weight final_layer.linear.bias final_layer.scale_shift_table
""".split()
CONVERTED_IN_A_BLOCK = """
    scale_shift_table attn.qkv.weight attn.proj.weight attn.proj.bias mlp.inverted_conv.conv.weight mlp.inverted_conv.conv.bias
    mlp.depth_conv.conv.weight mlp.depth_conv.conv.bias mlp.point_conv.conv.weight cross_attn.q_linear.weight cross_attn.q_linear.bias
    cross_attn.kv_linear.weight cross_attn.kv_linear.bias cross_attn.proj.weight cross_attn.proj.bias
""".split()
DROPPED = ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias")
"""The keys that diffusers' scripts/convert_sana_to_diffusers.py reads for SanaMS models, for each block, and drops."""


def authors_file(state, config):
    """Our state dict under the authors' names, with what else their checkpoints hold."""
    names = {"y_embedder.0.": "y_embedder.y_proj.fc1.", "y_embedder.2.": "y_embedder.y_proj.fc2."}
    names |= {f".mlp.{conv}_conv.": f".mlp.{conv}_conv.conv." for conv in ("inverted", "depth", "point")}
    theirs = {}
    for key, value in state.items():
        name = key
        for ours, their in names.items():
            name = name.replace(ours, their)
        theirs[name] = value.clone()
    unused = {
        "y_embedder.y_embedding": torch.randn(config.caption_length, config.caption_channels),
        "pos_embed": torch.from_numpy(positions_fp64(config, config.sample_size, config.sample_size)).float()[None],
        "logvar_linear.weight": torch.randn(1, config.hidden_size),
        "logvar_linear.bias": torch.randn(1),
    }
    return theirs | unused


def load(spec, tensors, tmp_path):
    save_file(tensors, tmp_path / "sana.safetensors")
    module = spec.build()
    return module, load_weights(module, tmp_path / "sana.safetensors", spec.layouts)


@pytest.mark.parametrize(
    ("name", "settings"), [("sana-tiny", {}), ("sana-tiny", {"position_scale": 2.0}), ("sana-digits", {"position_scale": 0.5})]
)
def test_the_authors_layout(name, settings, tmp_path):
    spec, config = MODELS[name].spec(settings), dataclasses.replace(MODELS[name].config, **settings)
    ours = random_weights(spec, seed=4)
    tensors = authors_file(ours.state_dict(), config)
    assert set(tensors) == {*CONVERTED, *DROPPED, *(f"blocks.{i}.{key}" for i in range(config.depth) for key in CONVERTED_IN_A_BLOCK)}
    loaded, info = load(spec, tensors, tmp_path)
    assert info.layout == "NVlabs/Sana"
    inputs = draw(spec)
    assert torch.equal(loaded(**inputs), ours(**inputs))


def test_the_authors_layout_without_what_is_dropped(tmp_path):
    spec, config = TINY.spec(), TINY.config
    tensors = authors_file(random_weights(spec, seed=4).state_dict(), config)
    assert load(spec, {key: value for key, value in tensors.items() if key not in DROPPED}, tmp_path)[1].layout == "NVlabs/Sana"


@pytest.mark.parametrize(
    ("key", "shape", "match"),
    [
        ("pos_embed", (1, 64, 32), "SANA's 2K and 4K models have one, those for 512 and 1024 px have none"),
        ("blocks.0.attn.q_norm.weight", (32,), "SANA-1.5 or SANA-Sprint"),
        ("blocks.1.cross_attn.k_norm.weight", (32,), "SANA-1.5 or SANA-Sprint"),
        ("cfg_embedder.mlp.0.weight", (32, 256), "SANA-1.5 or SANA-Sprint"),
    ],
)
def test_other_architectures_are_refused_by_name(key, shape, match, tmp_path):
    spec = TINY.spec()
    tensors = authors_file(random_weights(spec, seed=4).state_dict(), TINY.config)
    with pytest.raises(WeightsError, match=match) as caught:
        load(spec, tensors | {key: torch.ones(shape)}, tmp_path)
    assert [reason.where for reason in caught.value.reasons] == [key]


@pytest.mark.parametrize("theirs", [{}, {"position_scale": 1.0}, {"position_scale": 2.0, "sample_size": 4}])
def test_the_position_embedding_of_another_model_is_refused(theirs, tmp_path):
    config = dataclasses.replace(TINY.config, **theirs)
    tensors = authors_file(random_weights(TINY.spec(theirs), seed=4).state_dict(), config)
    with pytest.raises(WeightsError, match="position embedding is not the model's") as caught:
        load(TINY.spec({"position_scale": 2.0}), tensors, tmp_path)
    assert "sana-1.6b-4k" in caught.value.hint


def test_half_of_the_authors_positions_is_near_enough(tmp_path):
    """The 2K and 4K models are published in bfloat16."""
    spec, config = TINY.spec({"position_scale": 2.0}), dataclasses.replace(TINY.config, position_scale=2.0)
    tensors = authors_file(random_weights(spec, seed=4).state_dict(), config)
    assert load(spec, {key: value.bfloat16() for key, value in tensors.items()}, tmp_path)[1].dtypes == ("BF16",)


def test_an_incomplete_file_in_the_authors_layout_is_refused(tmp_path):
    spec = TINY.spec()
    tensors = authors_file(random_weights(spec, seed=4).state_dict(), TINY.config)
    del tensors["blocks.1.mlp.depth_conv.conv.bias"]
    tensors["surplus.weight"] = torch.ones(2)
    with pytest.raises(WeightsError) as caught:
        load(spec, tensors, tmp_path)
    text = str(caught.value)
    assert "blocks.1.mlp.depth_conv.bias" in text
    assert "surplus.weight" in text


@pytest.mark.parametrize("settings", [{"patch_size": 3}, {"head_dim": 5}, {"num_cross_heads": 3}, {"depth": 0}, {"position_scale": -1.0}])
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
