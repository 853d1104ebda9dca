"""Our solvers against diffusers' schedulers around the same network, on their grids."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.dpm_solver import Level, solve
from isthmus.models.flow import TIME_SCALE

from .compare import draw


@pytest.mark.parametrize(("seed", "batch", "steps"), [(0, 2, 8), (1, 5, 3)])
def test_rectified_flow_by_euler(seed, batch, steps):
    spec = MODELS["rectified-flow-tiny"].spec({"steps": steps})
    ours = random_weights(spec, seed=3)
    inputs = draw(spec, seed, batch=batch)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    x = inputs["noise"]
    for t in scheduler.timesteps:
        x = scheduler.step(ours.velocity(x, t.item() / TIME_SCALE, inputs["y"]), t, x).prev_sample
    got = ours(**inputs)
    assert (got - x).abs().max() < 1e-5 * (x.max() - x.min())
    assert (got - inputs["noise"]).abs().max() > 0.1


@pytest.mark.parametrize(("seed", "batch", "steps"), [(0, 2, 8), (1, 5, 3), (2, 1, 2)])
def test_rectified_flow_by_heun(seed, batch, steps):
    spec = MODELS["rectified-flow-heun-tiny"].spec({"steps": steps})
    ours = random_weights(spec, seed=3)
    inputs = draw(spec, seed, batch=batch)
    # Its grid goes from 1 to 1 / num_train_timesteps, and then to 0: an even one with as many steps as it was trained on.
    scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=steps)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == 2 * steps - 1
    x = inputs["noise"]
    for t in scheduler.timesteps:
        x = scheduler.step(ours.velocity(x, t.item() / steps, inputs["y"]), t, x).prev_sample
    got = ours(**inputs)
    assert (got - x).abs().max() < 1e-5 * (x.max() - x.min())
    by_euler = MODELS["rectified-flow-tiny"].spec({"steps": steps}).build()
    by_euler.load_state_dict(ours.state_dict())
    assert (got - by_euler(**inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("predicts", "prediction_type"), [("data", "sample"), ("noise", "epsilon")])
def test_dpm_solver(order, final, predicts, prediction_type):
    spec = MODELS["dpm-solver-tiny"].spec()
    ours = random_weights(spec, seed=3)
    for seed, batch, steps in [(0, 2, 10), (1, 5, 20)]:
        inputs = draw(spec, seed, batch=batch)
        scheduler = DPMSolverMultistepScheduler(
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            solver_order=order,
            prediction_type=prediction_type,
            algorithm_type="dpmsolver++",
            solver_type="midpoint",
            final_sigmas_type=final,
        )
        scheduler.set_timesteps(steps)
        x = inputs["noise"]
        for t in scheduler.timesteps:
            x = scheduler.step(ours.network(x, t.item() / 1000, inputs["y"]), t, x).prev_sample
        times = [t.item() / 1000 for t in scheduler.timesteps] + [0.0]
        ratios = [sigma.item() for sigma in scheduler.sigmas]  # sigma / alpha
        levels = [Level(t, 1 / np.sqrt(1 + r**2), r / np.sqrt(1 + r**2)) for t, r in zip(times, ratios, strict=True)]

        def network(x, level, y=inputs["y"]):
            return ours.network(x, level.time, y)

        got = solve(network, inputs["noise"], levels, order=order, predicts=predicts)
        assert (got - x).abs().max() < 1e-5 * (x.max() - x.min())
