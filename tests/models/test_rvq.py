"""Residual VQ against its definition in float64, ties, and the rotation trick."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.rvq import rotate

NAMES = ["rvq-tiny", "rvq-shared-tiny"]


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


@pytest.mark.parametrize("name", NAMES)
def test_encode_is_the_definition(name):
    spec, config = MODELS[name].spec(), MODELS[name].config
    module = random_weights(spec, seed=1)
    books = module.codebooks.double().numpy()
    x = draw(spec, length=9)["x"]
    quantized, indices, stages = module(x)
    for row, got, codes, parts in zip(
        x.double().numpy().reshape(-1, 8), quantized.reshape(-1, 8), indices.reshape(-1, 3), stages.reshape(-1, 3, 8), strict=True
    ):
        residual = row
        for stage in range(3):
            book = books[0 if config.shared else stage]
            nearest = int(np.argmin(((residual - book) ** 2).sum(1)))
            assert codes[stage] == nearest
            np.testing.assert_array_equal(parts[stage].numpy(), book[nearest].astype(np.float32))
            residual = residual - book[nearest]
        np.testing.assert_allclose(got, row - residual, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_decode_gives_what_encode_gave(name):
    spec = MODELS[name].spec()
    module = random_weights(spec, seed=2)
    decoder = MODELS[name].spec({"decode": True}).build()
    decoder.load_state_dict(module.state_dict())
    quantized, indices, _ = module(**draw(spec))
    assert torch.equal(decoder(indices), quantized)
    assert indices.reshape(-1).unique().numel() > 10


def test_of_equally_near_vectors_the_first_is_taken():
    spec = MODELS["rvq-tiny"].spec({"num_quantizers": 1})
    module = random_weights(spec, seed=3)
    x = draw(spec)["x"]
    before = module(x)[1]
    with torch.no_grad():
        module.codebooks[:, 16:] = module.codebooks[:, :16].clone()
    assert (before >= 16).any()
    assert (module(x)[1] < 16).all()


def test_stages_come_nearer():
    module = random_weights(MODELS["rvq-tiny"].spec(), seed=1)
    x = draw(MODELS["rvq-tiny"].spec(), length=64)["x"]
    stages = module(x)[2].cumsum(2)
    errors = [float((x - stages[:, :, i]).square().mean()) for i in range(3)]
    assert errors[0] > errors[1] > errors[2]


def test_the_rotation_trick_has_the_value_of_the_code_and_the_gradient_of_the_rotation():
    generator = torch.Generator().manual_seed(0)
    r, q = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    r.requires_grad_()
    out = rotate(r, q)
    torch.testing.assert_close(out, q, rtol=1e-12, atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(lambda v: rotate(v, q), r).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    scale = (q.norm(dim=-1) / r.norm(dim=-1)).detach()
    # Orthogonal up to the scale, of determinant 1, and the identity on what is normal to both.
    rotation = jacobian / scale[:, None, None]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(8, dtype=torch.float64).expand(5, 8, 8))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(5, dtype=torch.float64))
    for i in range(5):
        span, _ = torch.linalg.qr(torch.stack([r[i].detach(), q[i]], 1))
        normal = torch.randn(8, generator=generator, dtype=torch.float64)
        normal = normal - span @ (span.T @ normal)
        torch.testing.assert_close(rotation[i] @ normal, normal)


@pytest.mark.parametrize("settings", [{"dim": 0}, {"codebook_size": 0}, {"num_quantizers": 0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        dataclasses.replace(MODELS["rvq-tiny"].config, **settings)


def test_published_sizes():
    for name, numbers in [("rvq-encodec-24khz", 32 * 1024 * 128), ("rvq-soundstream", 8 * 1024 * 256), ("rvq-image-8x8x4", 16384 * 256)]:
        with torch.device("meta"):
            module = MODELS[name].spec().build()
        assert sum(p.numel() for p in module.parameters()) == numbers
