"""The learned JKO scheme against its formulas in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights

TINY = MODELS["jko-tiny"]


def draw(spec, seed=0, batch=2):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {"batch": batch})


def mlp_fp64(state, name, x):
    for i in (0, 2, 4):
        x = state[f"{name}.{i}.weight"] @ (x if i == 0 else x / (1 + np.exp(-x))) + state[f"{name}.{i}.bias"]
    return x


@pytest.mark.parametrize("settings", [{}, {"h": 0.5, "steps": 5, "features": 2}])
def test_forward_is_the_formula(settings):
    spec, config = TINY.spec(settings), dataclasses.replace(TINY.config, **settings)
    module = random_weights(spec, seed=1)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    inputs = draw(spec)
    path, potentials, costs = module(**inputs)
    assert (path.shape, potentials.shape, costs.shape) == ((2, config.steps + 1, config.features), (2, config.steps), (2, config.steps))
    for i in range(2):
        x = inputs["x"][i].double().numpy()
        for k in range(config.steps):
            after = x + mlp_fp64(state, f"maps.{k}", x)
            assert np.abs(path[i, k].numpy() - x).max() < 1e-5
            assert abs(potentials[i, k].item() - mlp_fp64(state, f"potentials.{k}", after).item()) < 1e-5
            assert abs(costs[i, k].item() / (((after - x) ** 2).sum() / (2 * config.h)) - 1) < 1e-5
            x = after
        assert np.abs(path[i, -1].numpy() - x).max() < 1e-5


def test_each_step_has_a_map_of_its_own():
    module = random_weights(TINY.spec(), seed=1)
    path = module(**draw(TINY.spec()))[0]
    changes = path.diff(dim=1)
    assert (changes[:, 0] - changes[:, 1]).abs().max() > 0.1
    module.maps[2][4].weight.zero_()
    module.maps[2][4].bias.zero_()
    got, _, costs = module(**draw(TINY.spec()))
    assert torch.equal(got[:, 2], got[:, 3])
    assert torch.count_nonzero(costs[:, 2]) == 0
    assert torch.equal(got[:, :3], path[:, :3])


def test_published_size():
    config = MODELS["jko-2d"].config
    with torch.device("meta"):
        module = MODELS["jko-2d"].spec().build()
    inner = 2 * 256 + 256 + 256 * 256 + 256
    assert sum(p.numel() for p in module.parameters()) == config.steps * (2 * inner + 256 * 2 + 2 + 256 + 1)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"h": 0.0}, {"hidden": 0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)
