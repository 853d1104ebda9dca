"""Consistency trajectory models against their formulas in float64; the U-Net is that of `models/consistency.py`, with its own parity."""

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.ctm import CTMConfig

TINY = MODELS["ctm-tiny"]


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def network(module, x, t, s, y):
    """F in float64, on the inputs that the paper scales."""
    wide = module.unet.double()
    with torch.no_grad():
        return wide(x / torch.sqrt(t**2 + 0.25)[:, None, None, None], 250 * torch.log(t), y, 250 * torch.log(s)).numpy()


@pytest.fixture
def drawn():
    spec = TINY.spec()
    module = random_weights(spec, seed=0)
    return module, spec.inputs(rng(1), {"batch": 3})


def test_both_modes_in_float64(drawn, monkeypatch):
    module, inputs = drawn
    score = MODELS["ctm-score-tiny"].spec().build()
    score.load_state_dict(module.state_dict(), strict=True)
    with torch.no_grad():
        got = module(**inputs).double().numpy()
        small = {**inputs, "t": torch.tensor([0.3, 0.7, 1.9])}
        got_score = score(small["x"], small["t"], small["y"]).double().numpy()
    # The sinusoids are computed in float32 by design; the network is in float64 here.
    monkeypatch.setattr("isthmus.models.consistency.timestep_embedding", _sinusoids)
    x, t, s, y = (inputs[name].double() if inputs[name].is_floating_point() else inputs[name] for name in ("x", "t", "s", "y"))

    def denoised(t, s):
        skip, out = (v.numpy()[:, None, None, None] for v in (0.25 / (t**2 + 0.25), 0.5 * t / torch.sqrt(t**2 + 0.25)))
        return skip * x.numpy() + out * network(module, x, t, s, y)

    share = (s / t).numpy()[:, None, None, None]
    expected = share * x.numpy() + (1 - share) * denoised(t, s)
    assert np.abs(got - expected).max() <= 2e-5 * np.ptp(expected)
    t = small["t"].double()
    expected = (denoised(t, t) - x.numpy()) / (t.numpy() ** 2)[:, None, None, None]
    assert np.abs(got_score - expected).max() <= 2e-5 * np.ptp(expected)


def _sinusoids(t, dim):
    """In the precision of t, for angles of some thousands."""
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


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
