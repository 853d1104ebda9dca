"""Mamba-2 against its formulas in float64, its two forms against each other, and the layouts of its published weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights
from isthmus.models.mamba2 import Mamba2Block, Mamba2Config

from . import mamba2_formulas, mamba_formulas

TINY = MODELS["mamba2-tiny"]


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
    """Random weights whose norms and skips are not all ones."""
    module = random_weights(spec, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith(("norm.weight", ".D")):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def mamba2_fp64(config, state, tokens, conv, S):
    """Tokens (L,), conv (depth, channels, W - 1) and S (depth, H, N, P) to logits (L, vocabulary) and the states."""
    x = state["backbone.embedding.weight"][tokens]
    convs, after = [], []
    for i in range(config.depth):
        normed = mamba_formulas.rms_norm(state, f"backbone.layers.{i}.norm", x)
        y, conv_after, S_after = mamba2_formulas.block(
            state, f"backbone.layers.{i}.mixer", normed, conv[i], S[i], groups=config.groups, eps=config.norm_eps
        )
        convs.append(conv_after)
        after.append(S_after)
        x = x + y
    logits = mamba_formulas.rms_norm(state, "backbone.norm_f", x) @ state["backbone.embedding.weight"].T
    return logits, np.stack(convs), np.stack(after)


@pytest.mark.parametrize(
    ("settings", "length"),
    [({}, 16), ({}, 2), ({"groups": 1, "conv_size": 2, "expand": 3}, 7), ({"groups": 4, "head_size": 16, "depth": 1}, 70)],
)
def test_the_prefill_is_the_formula(settings, length):
    spec = TINY.spec(settings)
    config = dataclasses.replace(TINY.config, **settings)
    module = varied(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    inputs = draw(spec, batch=2, length=length)
    results = [x.double().numpy() for x in module(**inputs)]
    for i in range(2):
        given = (inputs["tokens"][i].numpy(), inputs["conv_states"][i].double().numpy(), inputs["ssm_states"][i].double().numpy())
        for got, expected in zip(results, mamba2_fp64(config, state, *given), strict=True):
            assert np.ptp(expected) > 0.1
            assert np.abs(got[i] - expected).max() <= 1e-5 * np.ptp(expected)


def test_step_by_step_is_the_prefill():
    module, step = varied(TINY.spec(), seed=2), MODELS["mamba2-step-tiny"].spec().build()
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
    module = varied(TINY.spec(), seed=2)
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
    block = Mamba2Block(8, state_size=4, head_size=8).eval()
    x = torch.randn(2, 5, 8)
    for a, b in zip(block(x), block(x, torch.zeros(2, 24, 3), torch.zeros(2, 2, 4, 8)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Of the published files, with the embedding counted once; transformers' Mamba2ForCausalLM with their settings has as many.
    [
        ("mamba2-130m", 128_989_632),
        ("mamba2-370m", 368_346_624),
        ("mamba2-780m", 780_161_280),
        ("mamba2-1.3b", 1_343_757_312),
        ("mamba2-2.7b", 2_702_599_680),
    ],
)
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        modules = [MODELS[n].spec().build() for n in (name, name.replace("mamba2-", "mamba2-step-"))]
    for module in modules:
        assert sum(p.numel() for p in module.parameters()) == parameters
    assert MODELS[name].config == MODELS[name.replace("mamba2-", "mamba2-step-")].config


def test_the_authors_layout(tmp_path):
    spec = TINY.spec()
    ours = varied(spec, seed=4)
    save_file(
        {**ours.state_dict(), "lm_head.weight": ours.state_dict()["backbone.embedding.weight"].clone()}, tmp_path / "model.safetensors"
    )
    loaded = spec.build()
    assert load_weights(loaded, tmp_path / "model.safetensors", spec.layouts).layout == "state-spaces/mamba"
    for key, value in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize("settings", [{"depth": 0}, {"conv_size": 1}, {"head_size": 7}, {"groups": 5}, {"norm_eps": 0.0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        Mamba2Config(**settings)
