"""Sinkhorn's iterations in the log domain against the plain ones in float64, and what makes a transport plan one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS

TINY = MODELS["sinkhorn-tiny"]


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def doubles(spec, seed=0):
    """Inputs in float64, with weights that sum to 1 in it."""
    inputs = {name: value.double() for name, value in draw(spec, seed).items()}
    return inputs | {name: inputs[name] / inputs[name].sum(1, keepdim=True) for name in "ab"}


def sinkhorn_fp64(config, x, y, a, b):
    """One pair of clouds, by products with exp(-C / eps)."""
    cost = np.array([[sum((p - q) ** 2) for q in y] for p in x])
    cost = cost if config.cost == "sqeuclidean" else np.sqrt(cost)
    kernel = np.exp(-cost / config.epsilon)
    v = np.ones(len(y))
    for _ in range(config.iterations):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    plan = u[:, None] * kernel * v[None]
    return plan, (plan * cost).sum(1), config.epsilon * np.log(u), config.epsilon * np.log(v)


@pytest.mark.parametrize("settings", [{}, {"cost": "euclidean", "iterations": 3}, {"points": 5, "targets": 3, "dimensions": 4}])
def test_forward_is_the_formula(settings):
    spec, config = TINY.spec(settings), dataclasses.replace(TINY.config, **settings)
    for inputs, bound in ((doubles(spec), 1e-13), (draw(spec), 3e-6)):
        outputs = spec.build()(**inputs)
        for i in range(2):
            expected = sinkhorn_fp64(config, *(value[i].double().numpy() for value in inputs.values()))
            for got, want in zip(outputs, expected, strict=True):
                assert got[i].shape == want.shape
                assert np.abs(got[i].numpy() - want).max() < bound


def test_the_marginals_hold():
    """The columns after any number of iterations, the rows when they have converged."""
    spec = TINY.spec()
    inputs = doubles(spec)
    plan = spec.build()(**inputs)[0]
    assert (plan.sum(1) - inputs["b"]).abs().max() < 1e-14
    assert 1e-9 < (plan.sum(2) - inputs["a"]).abs().max() < 0.02
    plan = TINY.spec({"iterations": 400}).build()(**inputs)[0]
    assert (plan.sum(2) - inputs["a"]).abs().max() < 1e-12
    assert (plan > 0).all()


def test_little_regularisation_does_not_underflow():
    """With eps = 0.002, exp(-C / eps) is 0 in float32 for most pairs; the plan stays one, and is nearly a permutation."""
    spec = TINY.spec({"epsilon": 0.002, "iterations": 300, "points": 8, "targets": 8})
    inputs = draw(spec)
    uniform = torch.full((2, 8), 0.125)
    plan, costs, _, _ = spec.build()(inputs["x"], inputs["y"], uniform, uniform)
    assert (((inputs["x"][:, :, None] - inputs["y"][:, None]) ** 2).sum(3) / 0.002 > 104).float().mean() > 0.3
    assert (plan.sum(1) - uniform).abs().max() < 1e-5
    assert (plan.amax(2) > 0.08).all()
    assert torch.isfinite(costs).all()


def test_the_cost_nears_the_exact_one_from_above():
    """Between two pairs of points on a line, whose exact plan is known: the sorted one."""
    spec = TINY.spec({"points": 2, "targets": 2, "dimensions": 1, "epsilon": 0.05, "iterations": 200})
    half = torch.full((1, 2), 0.5)
    x, y = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[1.1], [0.2]]])
    plan, costs, _, _ = spec.build()(x, y, half, half)
    assert abs(costs.sum().item() - (0.2**2 + 0.1**2) / 2) < 1e-4
    assert plan[0, 0, 1] > 0.499


def test_any_number_of_points():
    """The settings give the example's; the model and its artifacts take others."""
    spec = TINY.spec()
    assert spec.dynamic == {
        "x": {0: "batch", 1: "points"},
        "y": {0: "batch", 1: "targets"},
        "a": {0: "batch", 1: "points"},
        "b": {0: "batch", 1: "targets"},
    }
    inputs = draw(spec, points=3, targets=20)
    outputs = spec.build()(**inputs)
    for i in range(2):
        for got, want in zip(outputs, sinkhorn_fp64(TINY.config, *(v[i].double().numpy() for v in inputs.values())), strict=True):
            assert np.abs(got[i].numpy() - want).max() < 3e-6


def test_published_size():
    """20 x 20 pixels, and lambda = 9 over the median distance."""
    config = MODELS["sinkhorn-mnist"].config
    axis = (np.arange(20) + 0.5) / 20
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    median = np.median(np.linalg.norm(grid[:, None] - grid[None], axis=-1))
    assert (config.points, config.targets, config.cost, config.iterations) == (400, 400, "euclidean", 20)
    assert abs(config.epsilon - median / 9) < 5e-4


@pytest.mark.parametrize("settings", [{"points": 0}, {"epsilon": 0.0}, {"cost": "cosine"}, {"iterations": 0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)
