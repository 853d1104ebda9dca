"""Jamba: its plan, its two forms against each other, and its size. Against transformers: tests/parity/test_jamba.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.jamba import JambaMamba

TINY, STEP = MODELS["jamba-tiny"], MODELS["jamba-step-tiny"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_step_by_step_is_the_prefill():
    prefill, step = random_weights(TINY.spec(), seed=1), random_weights(STEP.spec(), seed=1)
    step.load_state_dict(prefill.state_dict(), strict=True)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, 9)))
    logits, *states = prefill(tokens)
    start, *carried = prefill(tokens[:, :3])
    torch.testing.assert_close(start, logits[:, :3], rtol=1e-5, atol=1e-5)  # no token sees those after it
    for t in range(3, 9):
        out, *carried = step(tokens[:, t], *carried)
        torch.testing.assert_close(out, logits[:, t], rtol=1e-5, atol=1e-5)
    for got, expected in zip(carried, states, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["jamba-tiny", "jamba-step-tiny"])
def test_shapes_and_that_every_input_matters(name):
    spec = MODELS[name].spec()
    module = random_weights(spec, seed=1)
    inputs = spec.inputs(np.random.default_rng(0), {**spec.sizes, "batch": 3})
    outputs = module(**inputs)
    length = 7 if name == "jamba-tiny" else 6
    shapes = [(3, 7, 64) if name == "jamba-tiny" else (3, 64), *[(3, 1, 2, length, 16)] * 2, (3, 2, 128, 3), (3, 2, 128, 4)]
    assert [tuple(o.shape) for o in outputs] == shapes
    for key, value in inputs.items():
        other = (value + 1) % 64 if value.dtype == torch.int64 else value.flip(0)
        assert (module(**inputs | {key: other})[0] - outputs[0]).abs().max() > 1e-3


def test_the_published_plan():
    """1.5 Mini: 28 Mamba, 4 attention and 32 MLP sublayers, which are 43.75 %, 6.25 % and 50 %; half of the MLPs are mixtures."""
    config = MODELS["jamba-1.5-mini"].config
    assert config.attention_layers == (4, 12, 20, 28)
    assert config.expert_layers == tuple(range(1, 32, 2))
    sublayers = 2 * config.depth
    shares = [(config.depth - len(config.attention_layers)) / sublayers, len(config.attention_layers) / sublayers, config.depth / sublayers]
    assert shares == [0.4375, 0.0625, 0.5]


@pytest.mark.parametrize(("name", "billions"), [("jamba-1.5-mini", 51.57), ("jamba-step-1.5-mini", 51.57), ("jamba-1.5-large", 398.56)])
def test_published_size(name, billions):
    """The papers give 52 G and 398 G parameters."""
    with torch.device("meta"):
        module = MODELS[name].spec().build()
    assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    config = MODELS[name].config
    assert [isinstance(layer.mixer, JambaMamba) for layer in module.layers] == [i % 8 != 4 for i in range(config.depth)]


def test_the_published_context():
    """256 K tokens (arXiv:2408.12570), to which an artifact's sequences may grow; the examples stay short."""
    for name, spec in ((name, MODELS[name].spec()) for name in MODELS if name.startswith("jamba")):
        size, last = ("past", 1) if "step" in name else ("length", 0)
        longest = 4096 if name.endswith("tiny") else 256 * 1024
        assert spec.ranges[size].max == longest - last
        assert spec.sizes[size] <= spec.ranges[size].opt <= 16
        assert MODELS[name].spec({"context": 4}).ranges[size].max == 4 - last


@pytest.mark.parametrize(
    "settings",
    [
        {"context": 1},
        {"depth": 1},
        {"attn_offset": 3},
        {"expert_offset": 2},
        {"num_heads": 3},
        {"conv_size": 1},
        {"vocab_size": 0},
        {"attn_period": 1},
    ],
)
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match=r"must .*got"):
        dataclasses.replace(TINY.config, **settings)
