"""Consistency trajectory models against their formulas in float64, and the network against the authors', written from their code."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights
from isthmus.models.ctm import CTMConfig

from .adm_formulas import Authors

TINY = MODELS["ctm-tiny"]


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def loaded(settings, tmp_path, seed=0):
    """Both modes and the authors' network, with equal weights in the authors' layout."""
    config = dataclasses.replace(TINY.config, **settings)
    theirs = Authors(config, further=True)
    state = theirs.state(seed)
    save_file(state, tmp_path / "theirs.safetensors")
    ours = []
    for name in ("ctm-tiny", "ctm-score-tiny"):
        spec = MODELS[name].spec(settings)
        with torch.device("meta"):
            ours.append(spec.build())
        assert load_weights(ours[-1], tmp_path / "theirs.safetensors", spec.layouts).layout == "sony/ctm"
    return *ours, lambda *inputs: theirs.forward(state, *inputs)


@pytest.fixture
def drawn():
    spec = TINY.spec()
    module = random_weights(spec, seed=0)
    return module, spec.inputs(rng(1), {"batch": 3})


@pytest.mark.parametrize("settings", [{}, {"widths": (16, 16, 32), "attention": (True, False, True), "layers": 2}])
def test_both_modes_are_the_authors_in_float64(settings, tmp_path):
    module, score, network = loaded(settings, tmp_path)
    inputs = TINY.spec(settings).inputs(rng(1), {"batch": 3})
    with torch.no_grad():
        got = module(**inputs).double().numpy()
        small = {**inputs, "t": torch.tensor([0.3, 0.7, 1.9])}
        got_score = score(small["x"], small["t"], small["y"]).double().numpy()
    x, t, s, y = (inputs[name].double() if inputs[name].is_floating_point() else inputs[name] for name in ("x", "t", "s", "y"))

    def denoised(t, s):
        skip, out = (v.numpy()[:, None, None, None] for v in (0.25 / (t**2 + 0.25), 0.5 * t / torch.sqrt(t**2 + 0.25)))
        inner = network(x / torch.sqrt(t**2 + 0.25)[:, None, None, None], y, 250 * torch.log(t), 250 * torch.log(s))
        return skip * x.numpy() + out * inner.numpy()

    share = (s / t).numpy()[:, None, None, None]
    expected = share * x.numpy() + (1 - share) * denoised(t, s)
    assert np.abs(got - expected).max() <= 2e-5 * np.ptp(expected)
    t = small["t"].double()
    expected = (denoised(t, t) - x.numpy()) / (t.numpy() ** 2)[:, None, None, None]
    assert np.abs(got_score - expected).max() <= 2e-5 * np.ptp(expected)


@pytest.mark.parametrize("name", ["ctm-imagenet64", "ctm-score-imagenet64"])
def test_the_published_size(name):
    """The authors' network has 324.1 M parameters, 27.5 M of them the projections of s."""
    shapes = Authors(MODELS[name].config, further=True).shapes
    with torch.device("meta"):
        count = sum(p.numel() for p in MODELS[name].spec().build().parameters())
    assert count == sum(int(np.prod(shape)) for shape in shapes.values()) == 324_100_611
    assert sum(int(np.prod(shape)) for key, shape in shapes.items() if "emb_layers_s" in key) == 27_462_528


def test_going_nowhere_is_the_identity(drawn):
    module, inputs = drawn
    with torch.no_grad():
        assert torch.allclose(module(inputs["x"], inputs["t"], inputs["t"], inputs["y"]), inputs["x"], atol=1e-6)


def test_the_target_time_matters_and_zero_is_one(drawn):
    module, inputs = drawn
    with torch.no_grad():
        end = module(inputs["x"], inputs["t"], torch.zeros(3), inputs["y"])
        assert torch.isfinite(end).all()
        assert torch.equal(end, module.denoise(inputs["x"], inputs["t"], torch.full((3,), 0.001), inputs["y"]))
        assert (end - module.denoise(inputs["x"], inputs["t"], inputs["t"], inputs["y"])).abs().max() > 1e-3 * end.abs().max()


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="'trajectory' or 'score'"):
        CTMConfig(mode="both")
