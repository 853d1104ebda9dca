"""SwiGLU against its formula in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights

TINY = MODELS["swiglu-tiny"]


def draw(seed=0, **sizes):
    spec = TINY.spec()
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})["x"]


def swiglu_fp64(x, W, V, W2):
    """Equation 6 of the paper, with matrices that map from their first axis to their second."""
    a = x @ W
    return (a / (1 + np.exp(-a)) * (x @ V)) @ W2


@pytest.mark.parametrize("sizes", [{}, {"batch": 1, "length": 3}])
def test_forward_is_the_formula(sizes):
    module = random_weights(TINY.spec(), seed=1)
    x = draw(**sizes)
    W, V, W2 = (getattr(module, f"{name}_proj").weight.double().numpy().T for name in ("gate", "up", "down"))
    expected = swiglu_fp64(x.double().numpy(), W, V, W2)
    assert np.abs(module(x).numpy() - expected).max() <= 1e-6 * np.ptp(expected)


def test_published_size():
    """Llama rounds 2/3 of 4 * 4096 up to a multiple of 256."""
    config = MODELS["swiglu-llama-7b"].config
    assert (config.dim, config.hidden_dim) == (4096, -(-(2 * 4 * 4096 // 3) // 256) * 256) == (4096, 11008)
    with torch.device("meta"):
        module = MODELS["swiglu-llama-7b"].spec().build()
    assert sum(p.numel() for p in module.parameters()) == 3 * 4096 * 11008
    assert not [name for name, _ in module.named_parameters() if "bias" in name]


def test_meta_s_names(tmp_path):
    ours = random_weights(TINY.spec(), seed=1)
    theirs = {f"w{i}.weight": getattr(ours, f"{name}_proj").weight.contiguous() for i, name in ((1, "gate"), (3, "up"), (2, "down"))}
    save_file(theirs, tmp_path / "meta.safetensors")
    loaded = TINY.spec().build()
    assert load_weights(loaded, tmp_path / "meta.safetensors", TINY.spec().layouts).layout == "meta-llama"
    assert torch.equal(loaded(draw()), ours(draw()))
    del theirs["w3.weight"]
    save_file(theirs, tmp_path / "incomplete.safetensors")
    with pytest.raises(WeightsError):
        load_weights(TINY.spec().build(), tmp_path / "incomplete.safetensors", TINY.spec().layouts)


@pytest.mark.parametrize("settings", [{"dim": 0}, {"hidden_dim": 0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match=r"must be .*got"):
        dataclasses.replace(TINY.config, **settings)
