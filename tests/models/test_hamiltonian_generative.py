"""The Hamiltonian generative network: gradients against autograd, the rollout from the formula, and the drift of the energy."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace
from isthmus.exporter.weights import random_weights

TINY = MODELS["hamiltonian-generative-tiny"]


def draw(spec, seed=0, batch=2):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {"batch": batch})


def phase(batch=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))


def energy(state, q, p):
    """H from the formula, for autograd."""
    x = torch.cat([q, p], dim=1)
    for i in range(TINY.config.energy_depth):
        convolved = F.conv2d(x, state[f"hamiltonian.layers.{i}.weight"], state[f"hamiltonian.layers.{i}.bias"], padding=1)
        x = torch.log1p(torch.exp(convolved))
    return x.flatten(1) @ state["hamiltonian.linear.weight"].T + state["hamiltonian.linear.bias"]


def slopes(state, q, p):
    q, p = q.clone().requires_grad_(), p.clone().requires_grad_()
    return torch.autograd.grad(energy(state, q, p).sum(), (q, p))


def test_the_gradients_are_autograds():
    module = random_weights(TINY.spec(), seed=1).double()
    q, p = phase()
    value, before = module.hamiltonian(q, p)
    assert (value.sum(1, keepdim=True) - energy(module.state_dict(), q, p)).abs().max() < 1e-12
    for got, expected in zip(module.hamiltonian.gradient(before), slopes(module.state_dict(), q, p), strict=True):
        assert (got - expected).abs().max() < 1e-12
        assert expected.abs().max() > 0.05


def test_forward_is_the_formula():
    module = random_weights(TINY.spec(), seed=1).double()
    config, state = module.config, module.state_dict()
    inputs = {name: value.double() for name, value in draw(TINY.spec()).items()}

    def convolve(name, x, **settings):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **settings)

    h = inputs["frames"].reshape(2, 3, 16, 16)
    for i in range(2):
        h = convolve(f"encoder.layers.{i}", h, padding=1).relu()
    spread = torch.exp(convolve("encoder.log_variance", h, padding=1) / 2)
    z = convolve("encoder.mean", h, padding=1) + spread * inputs["noise"]
    for i in range(3):
        z = convolve(f"phase_space.layers.{i}", z if i == 0 else z.relu(), padding=1, stride=2)
    q, p = z[:, :4], z[:, 4:]
    energies, pictures = [energy(state, q, p)], [q]
    for _ in range(config.steps):
        p = p - config.dt / 2 * slopes(state, q, p)[0]
        q = q + config.dt * slopes(state, q, p)[1]
        p = p - config.dt / 2 * slopes(state, q, p)[0]
        energies.append(energy(state, q, p))
        pictures.append(q)
    for k, position in enumerate(pictures):
        x = position
        for i in range(3):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            block = f"decoder.blocks.{i}"
            inner = F.leaky_relu(convolve(f"{block}.conv1", x, padding=1), 0.2)
            x = F.leaky_relu(convolve(f"{block}.skip", x) + convolve(f"{block}.conv2", inner, padding=1), 0.2)
        pictures[k] = 1 / (1 + torch.exp(-convolve("decoder.out", x, padding=1)))
    got_pictures, got_energies = module(**inputs)
    assert (got_pictures - torch.stack(pictures, 1)).abs().max() < 1e-12
    assert (got_energies.sum(2) - torch.cat(energies, 1)).abs().max() < 1e-12
    assert (got_pictures[:, 0] - got_pictures[:, -1]).abs().max() > 1e-2


def test_the_energy_drifts_in_first_order():
    """Because H is not separable."""
    drifts = []
    for steps in (32, 64):
        module = random_weights(TINY.spec({"steps": steps, "dt": 1.0 / steps}), seed=1).double()
        energies = module.rollout(*phase(8))[1].sum(2)
        drifts.append((energies - energies[:, :1]).abs().max().item())
    assert 1.7 < drifts[0] / drifts[1] < 2.4


@pytest.mark.matrix
def test_the_energy_of_an_artifact_drifts_as_the_references():
    spec = TINY.spec({"dt": 0.5})
    module, inputs = random_weights(spec, seed=1), draw(spec)
    program = trace(module, inputs, dynamic=spec.dynamic, ranges=spec.ranges)
    model = to_onnx(program, opset=20, input_names=tuple(inputs), output_names=spec.outputs)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(["energies"], {key: value.numpy() for key, value in inputs.items()})
    expected = module.double()(*(value.double() for value in inputs.values()))[1].numpy()
    got, expected = got.sum(2), expected.sum(2)
    drift, reference = got - got[:, :1], expected - expected[:, :1]
    assert np.abs(reference).max() > 1e-4
    assert np.abs(drift - reference).max() < 5e-6


def test_noise_matters_and_zeros_give_the_mean():
    module = random_weights(TINY.spec(), seed=1)
    inputs = draw(TINY.spec())
    still = module(inputs["frames"], torch.zeros_like(inputs["noise"]))[0]
    assert (module(**inputs)[0] - still).abs().max() > 1e-2


def test_published_size():
    """As many layers as the paper names, on 30 pictures of 32x32, with (q, p) of 4x4."""
    with torch.device("meta"):
        module = MODELS["hamiltonian-generative-32"].spec().build()
    assert sum(p.numel() for p in module.parameters()) == 776_804  # ours: the paper gives none
    assert len(module.encoder.layers) + 1 == 8
    assert (module.encoder.layers[0].in_channels, module.encoder.mean.out_channels) == (90, 48)
    assert (len(module.hamiltonian.layers), len(module.decoder.blocks), module.hamiltonian.shape) == (6, 3, (1, 64, 4, 4))


@pytest.mark.parametrize("settings", [{"size": 12}, {"steps": 0}, {"dt": 0.0}, {"encoder_depth": 1}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)
