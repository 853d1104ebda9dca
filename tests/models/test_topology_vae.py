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
    """Row by row in float64, the gradient of the energy and the norm of the Jacobian by central differences."""
    n = config.segments
    curve = np.stack([start + (end - start) * i / n for i in range(n + 1)])

    def energy(curve):
        points = network(state, "decoder", curve)
        return n / 2 * sum(((points[i + 1] - points[i]) ** 2).sum() for i in range(n))

    energies, lengths = [energy(curve)], []
    for _ in range(config.steps):
        gradient = np.zeros_like(curve)
        for index in np.ndindex(curve[1:-1].shape):
            moved = [curve.copy() for _ in range(2)]
            for sign, other in zip((1, -1), moved, strict=True):
                other[index[0] + 1, index[1]] += sign * 1e-5
            gradient[index[0] + 1, index[1]] = (energy(moved[0]) - energy(moved[1])) / 2e-5
        steepness = sum(
            ((network(state, "decoder", curve + shift) - network(state, "decoder", curve - shift)) ** 2).sum(-1) / 4e-10
            for shift in 1e-5 * np.eye(config.latent_size)
        )
        lengths.append(np.minimum(config.rate, 1 / (4 * steepness)))
        curve = curve - lengths[-1][:, None] / n * gradient
        energies.append(energy(curve))
    return curve, network(state, "decoder", curve), energies, np.stack(lengths)[:, 1:-1]


@pytest.mark.parametrize(
    ("settings", "bounded"),
    [
        ({}, {False, True}),
        ({"latent_size": 3, "depth": 1, "segments": 5, "steps": 2, "rate": 0.05}, {False, True}),
        ({"depth": 3, "steps": 2, "rate": 0.01}, {False}),
        ({"steps": 2, "rate": 9.0}, {True}),
    ],
)
def test_geodesic_is_the_formula(settings, bounded):
    """Where `rate` is the longest step and where the decoder's steepness bounds it."""
    spec = MODELS["topology-vae-geodesic-tiny"].spec(settings)
    config = dataclasses.replace(MODELS["topology-vae-geodesic-tiny"].config, **settings)
    module = random_weights(spec, seed=1)
    inputs = draw(spec, batch=2)
    curve, points = module(**inputs)
    seen = set()
    for i in range(2):
        expected = geodesic(config, state_of(module), *(value[i].double().numpy() for value in inputs.values()))
        np.testing.assert_allclose(curve[i], expected[0], atol=1e-5)
        np.testing.assert_allclose(points[i], expected[1], atol=1e-5)
        np.testing.assert_allclose(curve_energy(points)[i], expected[2][-1], rtol=1e-5)
        assert (np.diff(expected[2]) < 0).all()
        seen |= set((expected[3] < config.rate).ravel().tolist())
        start, end = curve[i, :1], curve[i, -1:]
        line = start + (end - start) * torch.linspace(0, 1, config.segments + 1)[:, None]
        assert (line - curve[i]).abs().max() > 1e-3
    assert seen == bounded


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


@pytest.mark.parametrize(("gain", "rate"), [(1.0, 0.005), (4.0, 0.005), (1.0, 1e3)])
def test_the_energy_falls_with_every_step_at_the_published_size(gain, rate):
    """Also where a trained decoder is steeper by far, and whatever the setting allows."""
    entry = MODELS["topology-vae-geodesic-mnist"]
    for seed in range(3):
        spec = entry.spec({"rate": rate})
        module = random_weights(spec, seed=seed)
        for layer in module.decoder.layers:
            layer.weight.data.mul_(gain)
        seen, forward = [], module.decoder.with_jacobian
        module.decoder.with_jacobian = lambda z, forward=forward, seen=seen: seen.append(forward(z)) or seen[-1]
        with torch.no_grad():
            last = module(**draw(spec, seed, batch=2))[1]
        images = [torch.cat([last[:, :1], points, last[:, -1:]], 1) for points, _ in seen] + [last]
        energies = torch.stack([curve_energy(image.double()) for image in images])
        assert len(energies) == entry.config.steps + 1
        assert (energies.diff(dim=0) < 0).all()


def test_the_published_size():
    """No paper has a network of this size: the count is that of the layers, 784 to 256 to 256 to 4, and 2 to 256 to 256 to 784."""
    for name in MODELS:
        if name.startswith("topology-vae") and name.endswith("mnist"):
            with torch.device("meta"):
                module = MODELS[name].spec().build()
            counts = [sum(p.numel() for p in part.parameters()) for part in (module, module.encoder, module.decoder)]
            assert counts == [535_828, 267_780, 268_048]


def test_the_jacobian():
    module = random_weights(MODELS["topology-vae-geodesic-tiny"].spec(), seed=2).double()
    z = torch.randn(5, 2, dtype=torch.float64)
    point, columns = module.decoder.with_jacobian(z)
    torch.testing.assert_close(point, module.decoder(z))
    for i in range(5):
        torch.testing.assert_close(columns[i].mT, torch.autograd.functional.jacobian(module.decoder, z[i]))


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
