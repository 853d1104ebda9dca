"""Mamba against its formulas in float64, its two forms against each other, and the layouts of its published weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights
from isthmus.models.mamba import Mamba1Block, MambaConfig

from . import mamba_formulas as formulas

TINY = MODELS["mamba-tiny"]


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


def mamba_fp64(config, state, tokens, conv, h):
    """Tokens (L,), conv (depth, E, W - 1) and h (depth, E, N) to logits (L, vocabulary) and the states."""
    x = state["backbone.embedding.weight"][tokens]
    convs, hs = [], []
    for i in range(config.depth):
        normed = formulas.rms_norm(state, f"backbone.layers.{i}.norm", x)
        y, conv_after, h_after = formulas.block(state, f"backbone.layers.{i}.mixer", normed, conv[i], h[i])
        convs.append(conv_after)
        hs.append(h_after)
        x = x + y
    return formulas.rms_norm(state, "backbone.norm_f", x) @ state["backbone.embedding.weight"].T, np.stack(convs), np.stack(hs)


@pytest.mark.parametrize(
    ("settings", "length"),
    [({}, 16), ({}, 2), ({"conv_size": 2, "expand": 3, "dt_rank": 5}, 7), ({"depth": 3, "state_size": 1}, 70)],
)
def test_the_prefill_is_the_formula(settings, length):
    spec = TINY.spec(settings)
    config = dataclasses.replace(TINY.config, **settings)
    module = random_weights(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    inputs = draw(spec, batch=2, length=length)
    results = [x.double().numpy() for x in module(**inputs)]
    for i in range(2):
        given = (inputs["tokens"][i].numpy(), inputs["conv_states"][i].double().numpy(), inputs["ssm_states"][i].double().numpy())
        for got, expected in zip(results, mamba_fp64(config, state, *given), strict=True):
            assert np.ptp(expected) > 0.1
            assert np.abs(got[i] - expected).max() <= 1e-5 * np.ptp(expected)


def test_step_by_step_is_the_prefill():
    module, step = random_weights(TINY.spec(), seed=2), MODELS["mamba-step-tiny"].spec().build()
    step.load_state_dict(module.state_dict(), strict=True)
    inputs = draw(TINY.spec(), seed=1, length=9)
    logits, conv, ssm = module(**inputs)
    states, streamed = (inputs["conv_states"], inputs["ssm_states"]), []
    for token in inputs["tokens"].unbind(1):
        out, *states = step(token, *states)
        streamed.append(out)
    close(torch.stack(streamed, dim=1), logits)
    close(states[0], conv)
    close(states[1], ssm)


@pytest.mark.parametrize("cut", [1, 2, 11])
def test_a_prompt_in_two_pieces_is_the_prompt(cut):
    module = random_weights(TINY.spec(), seed=2)
    inputs = draw(TINY.spec(), seed=3, length=12)
    tokens = inputs["tokens"]
    logits, conv, ssm = module(**inputs)
    first, *states = module(tokens[:, :cut], inputs["conv_states"], inputs["ssm_states"])
    second, *states = module(tokens[:, cut:], *states)
    close(torch.cat([first, second], dim=1), logits)
    close(states[0], conv)
    close(states[1], ssm)


def test_a_block_without_states_starts_from_zeros():
    torch.manual_seed(0)
    block = Mamba1Block(8, state_size=4, bias=True).eval()
    x = torch.randn(2, 5, 8)
    without, zeros = block(x), block(x, torch.zeros(2, 16, 3), torch.zeros(2, 16, 4))
    for a, b in zip(without, zeros, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # transformers' MambaForCausalLM with the published config.json has as many.
    [
        ("mamba-130m", 129_135_360),
        ("mamba-370m", 371_516_416),
        ("mamba-790m", 793_204_224),
        ("mamba-1.4b", 1_372_178_432),
        ("mamba-2.8b", 2_768_345_600),
    ],
)
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        modules = [MODELS[n].spec().build() for n in (name, name.replace("mamba-", "mamba-step-"))]
    for module in modules:
        assert sum(p.numel() for p in module.parameters()) == parameters
    assert MODELS[name].config == MODELS[name.replace("mamba-", "mamba-step-")].config


@pytest.mark.parametrize("layout", ["state-spaces/mamba", "transformers"])
def test_layouts(layout, tmp_path):
    spec = TINY.spec()
    ours = random_weights(spec, seed=4)
    state = dict(ours.state_dict())
    if layout == "transformers":
        state["backbone.embeddings.weight"] = state.pop("backbone.embedding.weight")
    else:
        state["lm_head.weight"] = state["backbone.embedding.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    loaded = spec.build()
    assert load_weights(loaded, tmp_path / "model.safetensors", spec.layouts).layout == layout
    for key, value in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_a_head_of_its_own_is_refused(tmp_path):
    spec = TINY.spec()
    state = dict(random_weights(spec, seed=4).state_dict())
    state["lm_head.weight"] = state["backbone.embedding.weight"] + 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="copies of backbone"):
        load_weights(spec.build(), tmp_path / "model.safetensors", spec.layouts)


@pytest.mark.parametrize("settings", [{"depth": 0}, {"conv_size": 1}, {"dt_rank": -1}, {"norm_eps": 0.0}, {"vocab_size": 0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        MambaConfig(**settings)
