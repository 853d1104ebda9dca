"""Our neural ODE solvers against torchdiffeq on the same field."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torchdiffeq import odeint

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.neural_ode import solve_adaptive

from .compare import draw


def field_of(module):
    def field(t, y):
        return module.field(t.reshape(1, 1).to(y.dtype), y)

    return field


@pytest.mark.parametrize(("seed", "batch"), [(0, 2), (1, 5)])
def test_fixed_steps(seed, batch):
    """What torchdiffeq calls rk4 is Kutta's 3/8 rule."""
    spec = MODELS["neural-ode-tiny"].spec({"method": "rk4-38", "steps": 5})
    ours = random_weights(spec, seed=3)
    y = draw(spec, seed, batch=batch)["y"]
    with torch.no_grad():
        theirs = odeint(field_of(ours), y, torch.tensor([0.0, 1.0]), method="rk4", options={"step_size": 0.2})[1]
        got = ours(y)
        classical = random_weights(MODELS["neural-ode-tiny"].spec({"steps": 5}), seed=3)(y)
    spread = (theirs.max() - theirs.min()).item()
    assert (got - theirs).abs().max().item() < 1e-6 * spread
    assert 0 < (classical - theirs).abs().max().item() < 1e-4 * spread


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize("seed", [0, 1])
def test_adaptive_steps(tolerance, seed):
    """Row by row, since torchdiffeq has one step for a batch; equal steps as well, seen in the number of evaluations."""
    wider = 1.5 * tolerance  # their estimate of the error is 2/3 of Dormand and Prince's
    settings = {"beta": 0.0, "rtol": wider, "atol": wider, "first_step": 0.3, "max_steps": 60, "t1": 2.0}
    spec = MODELS["neural-ode-dopri5-tiny"].spec(settings)
    ours = random_weights(spec, seed=3).double()
    y = 2 * draw(spec, seed, batch=3)["y"].double()
    got, steps, finished = ours(y)
    assert finished.all()
    for i in range(3):
        calls = 0

        def field(t, state):
            nonlocal calls
            calls += 1
            return ours.field(t.reshape(1, 1), state)

        times = torch.tensor([0.0, 2.0], dtype=torch.float64)
        options = {"first_step": 0.3, "step_t": times[1:]}
        theirs = odeint(field, y[i : i + 1], times, rtol=tolerance, atol=tolerance, method="dopri5", options=options)[1]
        assert (got[i] - theirs[0]).abs().max() < 1e-9
        tried = attempts(ours, y[i : i + 1])
        assert sum(tried) == steps[i]
        assert calls == 1 + 6 * len(tried)


def attempts(module, y):
    """Whether each attempt on one row was accepted, from runs that stop earlier and earlier."""
    counts, limit = [0], 1
    while True:
        _, steps, finished = solve_adaptive(module.field, y, dataclasses.replace(module.config, max_steps=limit))
        counts.append(steps.item())
        if finished.all():
            return [after > before for before, after in itertools.pairwise(counts)]
        limit += 1
