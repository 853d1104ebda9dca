"""Neural Hamiltonian flows: gradients against autograd, exact inverses, volume, densities, and the drift of the energy."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace
from isthmus.exporter.weights import random_weights

TINY = MODELS["hamiltonian-flow-tiny"]
FORMS = ("hamiltonian-flow-tiny", "hamiltonian-flow-inverse-tiny", "hamiltonian-flow-elbo-tiny")


def draw(spec, seed=0, batch=2):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {"batch": batch})


def doubles(seed=0, batch=3):
    inputs = draw(TINY.spec(), seed, batch)
    return inputs["q"].double(), inputs["p"].double()


def energy(module, name, x):
    """K or V from the formula, for autograd."""
    part = getattr(module, name)
    if name == "kinetic" and module.config.kinetic == "fixed":
        return (x**2 / (2 * torch.exp(part.log_mass))).sum(1, keepdim=True)
    for layer in (part.fc1, part.fc2, part.fc3):
        x = torch.log1p(torch.exp(layer(x)))
    return x


def slope(module, name, x):
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(energy(module, name, x).sum(), x)
    return found


@pytest.mark.parametrize("kinetic", ["learned", "fixed"])
def test_the_gradients_are_autograds(kinetic):
    module = random_weights(TINY.spec({"kinetic": kinetic}), seed=1).double()
    q, p = doubles()
    for name, x in (("potential", q), ("kinetic", p)):
        value, gradient = getattr(module, name)(x)
        assert (value - energy(module, name, x)).abs().max() < 1e-12
        assert (gradient - slope(module, name, x)).abs().max() < 1e-12
        assert gradient.abs().max() > 0.05


@pytest.mark.parametrize("kinetic", ["learned", "fixed"])
def test_forward_is_the_formula(kinetic):
    module = random_weights(TINY.spec({"kinetic": kinetic}), seed=1).double()
    q, p = first_q, first_p = doubles()
    dt, energies = module.config.dt, []
    for _ in range(module.config.steps):
        energies.append(torch.cat([energy(module, "kinetic", p), energy(module, "potential", q)], 1))
        p = p - dt / 2 * slope(module, "potential", q)
        q = q + dt * slope(module, "kinetic", p)
        p = p - dt / 2 * slope(module, "potential", q)
    energies.append(torch.cat([energy(module, "kinetic", p), energy(module, "potential", q)], 1))
    normal = torch.distributions.Normal(0.0, 1.0)
    density = normal.log_prob(first_q) + normal.log_prob(first_p)
    for got, expected in zip(module(first_q, first_p), (q, p, density, torch.stack(energies, 1)), strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() < 1e-12


def test_the_inverse_undoes_it():
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        there, back = (random_weights(MODELS[name].spec(), seed=1).to(dtype) for name in FORMS[:2])
        q, p = (x.to(dtype) for x in doubles())
        end_q, end_p, density, energies = there(q, p)
        assert (end_q - q).abs().max() > 0.1
        got_q, got_p, same_density, reversed_energies = back(end_q, end_p)
        assert (got_q - q).abs().max() < bound
        assert (got_p - p).abs().max() < bound
        assert (same_density - density).abs().max() < 20 * bound
        assert (reversed_energies.flip(1) - energies).abs().max() < 5 * bound


def test_the_volume_is_kept():
    module = random_weights(TINY.spec({"dt": 0.5}), seed=1).double()
    q, p = doubles(batch=1)

    def flow(z):
        return torch.cat(module(z[None, :4], z[None, 4:])[:2], dim=1)[0]

    jacobian = torch.autograd.functional.jacobian(flow, torch.cat([q, p], dim=1)[0])
    assert abs(torch.linalg.det(jacobian).item() - 1) < 1e-12
    assert (jacobian - torch.eye(8)).abs().max() > 0.1


def test_the_bound_is_the_formula():
    there, bound = (random_weights(MODELS[FORMS[i]].spec(), seed=1).double() for i in (1, 2))
    q, noise = doubles()
    mean, log_variance = bound.encoder(q)
    posterior = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
    p = mean + torch.exp(log_variance / 2) * noise
    expected = there(q, p)[2].sum(1) - posterior.log_prob(p).sum(1)
    assert (bound(q, noise)[0].sum(1) - expected).abs().max() < 1e-12


def test_the_energy_drifts_in_second_order():
    q, p = doubles(batch=16)
    drifts = []
    for steps in (16, 32):
        energies = random_weights(TINY.spec({"steps": steps, "dt": 4.0 / steps}), seed=1).double()(q, p)[3].sum(2)
        drifts.append((energies - energies[:, :1]).abs().max().item())
    assert 3.5 < drifts[0] / drifts[1] < 4.5


@pytest.mark.matrix
def test_the_energy_of_an_artifact_drifts_as_the_references():
    spec = TINY.spec({"steps": 6, "dt": 1.0})
    module, inputs = random_weights(spec, seed=1), draw(spec)
    program = trace(module, inputs, dynamic=spec.dynamic, ranges=spec.ranges)
    model = to_onnx(program, opset=20, input_names=tuple(inputs), output_names=spec.outputs)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(["energies"], {key: value.numpy() for key, value in inputs.items()})
    expected = module.double()(*(value.double() for value in inputs.values()))[3].numpy()
    got, expected = got.sum(2), expected.sum(2)
    drift, reference = got - got[:, :1], expected - expected[:, :1]
    assert np.abs(reference).max() > 1e-4
    assert np.abs(drift - reference).max() < 1e-6


def test_the_forms_share_their_weights():
    keys = [set(MODELS[name].spec().build().state_dict()) for name in FORMS]
    assert keys[0] == keys[1] == keys[2]


def test_published_size():
    """K, V and the encoder's two networks, each of 3 layers with 128 inside, on 2-D densities."""
    with torch.device("meta"):
        module = MODELS["hamiltonian-flow-2d"].spec().build()
    hidden = 2 * 128 + 128 + 128 * 128 + 128
    assert sum(p.numel() for p in module.parameters()) == 2 * (hidden + 129) + 2 * (hidden + 2 * 128 + 2)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"dt": 0.0}, {"form": "both"}, {"kinetic": "none"}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)
