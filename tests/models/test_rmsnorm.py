"""RMSNorm against its formula in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.layers import RMSNorm

TINY = MODELS["rmsnorm-tiny"]


def draw(seed=0, **sizes):
    spec = TINY.spec()
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})["x"]


def rms_norm_fp64(x, weight, eps):
    """Channel by channel, as in equation 4 of the paper, with the epsilon under the root."""
    out = np.empty_like(x)
    for place in np.ndindex(x.shape[:-1]):
        root = np.sqrt(sum(a * a for a in x[place]) / x.shape[-1] + eps)
        out[place] = [a / root * g for a, g in zip(x[place], weight, strict=True)]
    return out


@pytest.mark.parametrize("sizes", [{}, {"batch": 1, "length": 3}])
def test_forward_is_the_formula(sizes):
    module = random_weights(TINY.spec(), seed=1)
    assert module.weight.std() > 0.1  # the gains matter
    for scale in (1.0, 1e-3):  # the epsilon matters at the second: the mean square is about as large
        x = draw(**sizes) * scale
        expected = rms_norm_fp64(x.double().numpy(), module.weight.double().numpy(), TINY.config.eps)
        np.testing.assert_allclose(module(x).numpy(), expected, rtol=2e-6, atol=1e-12)


def test_the_scale_of_a_token_does_not_matter():
    module = random_weights(TINY.spec({"eps": 1e-12}), seed=1)
    x = draw()
    torch.testing.assert_close(module(1000 * x), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_squares_in_float32(dtype):
    """The square of 300 is beyond float16, and that of 1e-4 below it."""
    module = RMSNorm(8, eps=1e-12).to(dtype)
    for size in (300.0, 1e-4):
        x = torch.full((1, 8), size, dtype=dtype)
        y = module(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, torch.ones_like(y))


def test_a_token_of_zeros_gives_zeros():
    assert not random_weights(TINY.spec(), seed=1)(torch.zeros(1, 2, 32)).any()


def test_published_size():
    config = MODELS["rmsnorm-4096"].config
    assert (config.dim, config.eps) == (4096, 1e-5)
    assert sum(p.numel() for p in MODELS["rmsnorm-4096"].spec().build().parameters()) == 4096


@pytest.mark.parametrize("settings", [{"dim": 0}, {"eps": 0.0}, {"eps": 2.0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match=r"must be .*got"):
        dataclasses.replace(TINY.config, **settings)
