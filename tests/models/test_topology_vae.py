"""The VAE against numpy, and its geodesics against the formula with Jacobians by finite differences and against a known surface."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.topology_vae import curve_energy


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def state_of(module):
    return {key: value.double().numpy() for key, value in module.state_dict().items()}


def network(state, name, x):
    count = sum(key.startswith(f"{name}.layers.") and key.endswith("weight") for key in state)
    for i in range(count):
        x = x @ state[f"{name}.layers.{i}.weight"].T + state[f"{name}.layers.{i}.bias"]
        x = np.tanh(x) if i < count - 1 else x
    return x


def geodesic(config, state, start, end):
    """Row by row in float64, the gradient of the energy by central differences."""
    n = config.segments
    curve = np.stack([start + (end - start) * i / n for i in range(n + 1)])

    def energy(curve):
        points = network(state, "decoder", curve)
        return n / 2 * sum(((points[i + 1] - points[i]) ** 2).sum() for i in range(n))

    energies = [energy(curve)]
    for _ in range(config.steps):
        gradient = np.zeros_like(curve)
        for index in np.ndindex(curve[1:-1].shape):
            moved = [curve.copy() for _ in range(2)]
            for sign, other in zip((1, -1), moved, strict=True):
                other[index[0] + 1, index[1]] += sign * 1e-5
            gradient[index[0] + 1, index[1]] = (energy(moved[0]) - energy(moved[1])) / 2e-5
        curve = curve - config.rate / n * gradient
        energies.append(energy(curve))
    return curve, network(state, "decoder", curve), energies


@pytest.mark.parametrize(
    "settings", [{}, {"latent_size": 3, "depth": 1, "segments": 5, "steps": 2, "rate": 0.05}, {"depth": 3, "steps": 2}]
)
def test_geodesic_is_the_formula(settings):
    spec = MODELS["topology-vae-geodesic-tiny"].spec(settings)
    config = dataclasses.replace(MODELS["topology-vae-geodesic-tiny"].config, **settings)
    module = random_weights(spec, seed=1)
    inputs = draw(spec, batch=2)
    curve, points = module(**inputs)
    for i in range(2):
        expected = geodesic(config, state_of(module), *(value[i].double().numpy() for value in inputs.values()))
        np.testing.assert_allclose(curve[i], expected[0], atol=1e-5)
        np.testing.assert_allclose(points[i], expected[1], atol=1e-5)
        np.testing.assert_allclose(curve_energy(points)[i], expected[2][-1], rtol=1e-5)
        assert (np.diff(expected[2]) < 0).all()
        start, end = curve[i, :1], curve[i, -1:]
        line = start + (end - start) * torch.linspace(0, 1, config.segments + 1)[:, None]
        assert (line - curve[i]).abs().max() > 1e-3


def test_energy_falls_and_the_ends_stay():
    spec = MODELS["topology-vae-geodesic-tiny"].spec({"steps": 60})
    module = random_weights(spec, seed=1)
    inputs = draw(spec, batch=4)
    curve, points = module(**inputs)
    assert torch.equal(curve[:, 0], inputs["start"])
    assert torch.equal(curve[:, -1], inputs["end"])
    torch.testing.assert_close(points, module.decoder(curve))
    # A geodesic is run through at constant speed: segments grow equally long.
    lengths = points.diff(dim=1).norm(dim=-1)
    straight = module.decoder(inputs["start"][:, None] + torch.linspace(0, 1, 9)[:, None] * (inputs["end"] - inputs["start"])[:, None])
    before = straight.diff(dim=1).norm(dim=-1)
    few = MODELS["topology-vae-geodesic-tiny"].spec().build()
    few.load_state_dict(module.state_dict())
    assert (curve_energy(points) < curve_energy(few(**inputs)[1])).all()
    assert (curve_energy(few(**inputs)[1]) < curve_energy(straight)).all()
    assert (lengths.std(dim=1) / lengths.mean(dim=1) < before.std(dim=1) / before.mean(dim=1)).all()


def test_transposed_is_the_jacobians():
    module = random_weights(MODELS["topology-vae-geodesic-tiny"].spec(), seed=2).double()
    z, v = torch.randn(2, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(module.decoder, z)
    torch.testing.assert_close(module.decoder.transposed(module.decoder.with_hidden(z)[1], v), jacobian.T @ v)


def test_encode_decode_and_reconstruct():
    spec = MODELS["topology-vae-encode-tiny"].spec()
    encoder = random_weights(spec, seed=1)
    state = state_of(encoder)
    inputs = draw(spec)
    z, mean, logvar = encoder(**inputs)
    x, noise = (value.double().numpy() for value in inputs.values())
    expected = network(state, "encoder", x)
    np.testing.assert_allclose(mean, expected[:, :2], atol=1e-5)
    np.testing.assert_allclose(logvar, expected[:, 2:], atol=1e-5)
    np.testing.assert_allclose(z, expected[:, :2] + np.exp(expected[:, 2:] / 2) * noise, atol=1e-5)
    decoder, whole = (MODELS[name].spec().build() for name in ("topology-vae-decode-tiny", "topology-vae-tiny"))
    for other in (decoder, whole):
        other.load_state_dict(encoder.state_dict())
    np.testing.assert_allclose(decoder(z).detach(), network(state, "decoder", z.double().numpy()), atol=1e-5)
    assert all(torch.equal(got, want) for got, want in zip(whole(**inputs), (decoder(z), mean, logvar), strict=True))


@pytest.mark.parametrize("settings", [{"segments": 1}, {"rate": 0.0}, {"form": "interpolate"}, {"steps": 0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must be"):
        dataclasses.replace(MODELS["topology-vae-tiny"].config, **settings)
