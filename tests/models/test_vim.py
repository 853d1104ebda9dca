"""Vision Mamba against its formulas in float64, and its unidirectional form in pieces against the whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnxruntime
import psutil
import pytest
import torch
from safetensors.torch import save_file

import isthmus
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights
from isthmus.models.vim import VimConfig

from . import mamba_formulas as formulas

TINY, STREAM = MODELS["vim-tiny"], MODELS["vim-stream-tiny"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def varied(spec, seed):
    """Random weights in which class, positions and skips matter."""
    module = random_weights(spec, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name in ("cls_token", "pos_embed") or name.endswith(".D"):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def embed(config, state, x):
    """One picture (C, H, W) to its patches' tokens (patches, D), in raster order."""
    side, tokens = config.patch_size, []
    for row in range(0, config.image_size, side):
        for column in range(0, config.image_size, side):
            patch = x[:, row : row + side, column : column + side]
            tokens.append((state["patch_embed.proj.weight"] * patch).sum((1, 2, 3)) + state["patch_embed.proj.bias"])
    return np.stack(tokens)


def vim_fp64(config, state, x):
    """One picture (C, H, W) to logits."""
    tokens = embed(config, state, x)
    middle = len(tokens) // 2
    h = np.concatenate([tokens[:middle], state["cls_token"][0], tokens[middle:]]) + state["pos_embed"][0]
    zeros = (np.zeros((config.inner, config.conv_size - 1)), np.zeros((config.inner, config.state_size)))
    for i in range(config.depth):
        name = f"layers.{i}.mixer"
        stream, gate = np.split(formulas.linear(state, f"{name}.in_proj", formulas.rms_norm(state, f"layers.{i}.norm", h)), 2, axis=1)
        there = formulas.scan_stream(state, f"{name}.forwards", stream, gate, *zeros)[0]
        back = formulas.scan_stream(state, f"{name}.backwards", stream[::-1], gate[::-1], *zeros)[0][::-1]
        h = h + formulas.linear(state, f"{name}.out_proj", (there + back) / 2)
    return formulas.linear(state, "head", formulas.rms_norm(state, "norm_f", h[middle]))


@pytest.mark.parametrize("settings", [{}, {"image_size": 12, "conv_size": 2, "expand": 1, "depth": 3}])
def test_the_network_is_the_formula(settings):
    spec = TINY.spec(settings)
    config = dataclasses.replace(TINY.config, **settings)
    module = varied(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    inputs = draw(spec, batch=2)
    got = module(**inputs).double().numpy()
    for i in range(2):
        expected = vim_fp64(config, state, inputs["x"][i].double().numpy())
        assert np.ptp(expected) > 0.1
        assert np.abs(got[i] - expected).max() <= 1e-5 * np.ptp(expected)


def stream_fp64(config, state, patches, first, conv, ssm):
    """One picture's patches (n, C, p, p) from states (depth, E, W - 1) and (depth, E, N) to logits and the states."""
    flat = patches.reshape(len(patches), -1) @ state["patch_embed.proj.weight"].reshape(config.hidden_size, -1).T
    h = flat + state["patch_embed.proj.bias"] + state["pos_embed"][0][first : first + len(patches)]
    label = state["cls_token"][0] + state["pos_embed"][0][-1:]
    convs, ssms = [], []
    for i in range(config.depth):
        name = f"layers.{i}"
        y, conv_after, ssm_after = formulas.block(state, f"{name}.mixer", formulas.rms_norm(state, f"{name}.norm", h), conv[i], ssm[i])
        asked = formulas.block(state, f"{name}.mixer", formulas.rms_norm(state, f"{name}.norm", label), conv_after, ssm_after)[0]
        h, label = h + y, label + asked
        convs.append(conv_after)
        ssms.append(ssm_after)
    return formulas.linear(state, "head", formulas.rms_norm(state, "norm_f", label))[0], np.stack(convs), np.stack(ssms)


@pytest.mark.parametrize("patches", [1, 8, 16])
def test_the_stream_is_the_formula(patches):
    spec = STREAM.spec()
    module = varied(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    inputs = draw(spec, batch=2, patches=patches)
    results = [x.double().numpy() for x in module(**inputs)]
    for i in range(2):
        given = (inputs[name][i].double().numpy() for name in ("conv_states", "ssm_states"))
        expected = stream_fp64(STREAM.config, state, inputs["patches"][i].double().numpy(), inputs["first"][i].item(), *given)
        for got, reference in zip(results, expected, strict=True):
            assert np.ptp(reference) > 0.1
            assert np.abs(got[i] - reference).max() <= 1e-5 * np.ptp(reference)


@pytest.mark.parametrize("cuts", [(4, 8, 12), (1,), (7, 9)])
def test_a_picture_in_pieces_is_the_picture(cuts):
    module = varied(STREAM.spec(), seed=2)
    inputs = draw(STREAM.spec(), seed=3, patches=16)
    whole = module(**inputs)
    states = [inputs["conv_states"], inputs["ssm_states"]]
    for start, end in zip((0, *cuts), (*cuts, 16), strict=True):
        logits, *states = module(inputs["patches"][:, start:end], inputs["first"] + start, *states)
    for got, expected in zip((logits, *states), whole, strict=True):
        close(got, expected)


@pytest.mark.matrix
def test_a_long_picture_streams_through_onnxruntime_in_constant_memory(tmp_path):
    """4096 patches, as of a picture of 1024x1024, in pieces of 61 and the rest: the one call of all, and the formula in float64."""
    settings = {"image_size": 256}
    spec, config = STREAM.spec(settings), dataclasses.replace(STREAM.config, **settings)
    module = varied(spec, seed=5)
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    result = isthmus.export(
        "vim-stream-tiny",
        "onnxruntime",
        tmp_path / "out",
        precision="fp32",
        settings=settings,
        weights=tmp_path / "weights.safetensors",
    )
    assert result.manifest.verdict == "verified"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    total, piece = config.patches, 61
    assert total == 4096
    inputs = {name: value.numpy() for name, value in draw(spec, seed=6, batch=1, patches=total).items()} | {"first": np.zeros(1, np.int64)}
    names = ("conv_states", "ssm_states")
    before = tuple(inputs[name] for name in names)
    states, sizes, process = before, [], psutil.Process()
    for start in range(0, total, piece):
        given = {"patches": inputs["patches"][:, start : start + piece], "first": np.array([start])}
        logits, *states = session.run(None, given | dict(zip(names, states, strict=True)))
        sizes.append(process.memory_info().rss)
    assert max(sizes) - sizes[0] < 2 * 2**20, "the one call below takes 18 MiB more"
    streamed = (logits, *states)
    for got, expected in zip(streamed, session.run(None, inputs), strict=True):
        close(torch.from_numpy(got), torch.from_numpy(expected))
    weights = {key: value.double().numpy() for key, value in module.state_dict().items()}
    exact = stream_fp64(config, weights, inputs["patches"][0].astype(np.float64), 0, *(x[0].astype(np.float64) for x in before))
    for got, expected in zip(streamed, exact, strict=True):
        assert np.abs(got[0] - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.mark.parametrize("name", ["vim-stream-ti-16", "vim-stream-s-16"])
def test_published_streams_take_pictures_of_1024(name):
    entry = MODELS[name]
    assert entry.spec().ranges["patches"].max == (1024 // entry.config.patch_size) ** 2
    with torch.device("meta"):
        module = entry.spec().build()
    assert module.pos_embed.shape[1] == 4096 + 1


def test_the_streams_patches_are_those_of_the_picture():
    """Patches cut out by the caller are embedded as the convolution of whole pictures embeds them."""
    config = TINY.config
    module = varied(TINY.spec(), seed=2)
    x = draw(TINY.spec())["x"]
    side, grid = config.patch_size, config.image_size // config.patch_size
    patches = x.reshape(2, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    projection = module.patch_embed.proj
    got = torch.nn.functional.linear(patches.flatten(2), projection.weight.flatten(1), projection.bias)
    close(got, module.patch_embed(x))


def test_the_network_looks_both_ways():
    module = varied(TINY.spec(), seed=2).double()
    x = draw(TINY.spec(), batch=1)["x"].double()
    base = module(x)
    for row, column in ((0, 0), (15, 15)):
        other = x.clone()
        other[0, :, row, column] += 1
        assert (module(other) - base).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vim-ti-16", 7), ("vim-s-16", 26), ("vim-b-16", 98)],  # table 1 of the paper
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        module = MODELS[name].spec().build()
    assert round(sum(p.numel() for p in module.parameters()) / 1e6) == millions


def to_authors(state):
    """Our state dict under the authors' names, written independently of the model file."""
    theirs = {}
    for key, value in state.items():
        name = key.replace(".forwards", "")
        if ".backwards." in name:
            name = name.replace(".backwards", "")
            name = name.replace("A_log", "A_b_log").replace("conv1d", "conv1d_b").replace("_proj", "_proj_b")
            name = f"{name}_b" if name.endswith(".D") else name
        theirs[name] = value
    return theirs


def test_the_authors_layout(tmp_path):
    spec = TINY.spec()
    ours = varied(spec, seed=4)
    theirs = to_authors(ours.state_dict())
    mixer = {key.removeprefix("layers.0.mixer.") for key in theirs if key.startswith("layers.0.mixer.")}
    parts = ("conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias")
    assert mixer == {"in_proj.weight", "out_proj.weight", "A_log", "A_b_log", "D", "D_b", *parts} | {p.replace(".", "_b.") for p in parts}
    save_file(theirs, tmp_path / "model.safetensors")
    loaded = spec.build()
    assert load_weights(loaded, tmp_path / "model.safetensors", spec.layouts).layout == "hustvl/Vim"
    for key, value in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize("settings", [{"depth": 0}, {"conv_size": 1}, {"patch_size": 5}, {"norm_eps": 0.0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        VimConfig(**settings)
