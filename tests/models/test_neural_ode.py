"""Neural ODEs against matrix exponentials and the adaptive method's formulas in float64, row by row."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace
from isthmus.exporter.weights import random_weights
from isthmus.models.dynamics import TABLEAUS, grid, integrate
from isthmus.models.neural_ode import NeuralODE, NeuralODEConfig

TINY = MODELS["neural-ode-tiny"]
ADAPTIVE = MODELS["neural-ode-dopri5-tiny"]


class Linear(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, t, y):  # noqa: ARG002 - an autonomous field
        return y @ self.matrix.T


def turning(seed, size=4):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return matrix - matrix.T - 0.3 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("config", [NeuralODEConfig(steps=64), NeuralODEConfig(method="dopri5", rtol=1e-8, atol=1e-8, max_steps=200)])
def test_a_linear_field_gives_the_matrix_exponential(config):
    matrix = turning(1)
    y = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = NeuralODE(config, Linear(matrix))(y)
    got = got[0] if isinstance(got, tuple) else got
    assert (got - y @ torch.linalg.matrix_exp(matrix).T).abs().max() < 2e-6


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4), ("rk4-38", 4), ("dopri5", 5)])
def test_the_order_of_convergence(method, order):
    """Of a field that depends on time: the error falls by 2^order when the step is halved."""
    field = random_weights(TINY.spec(), seed=3).double().field
    y = torch.randn(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = integrate(field, TABLEAUS["dopri5"], y, grid(0.0, 1.0, 256))
    errors = [(integrate(field, TABLEAUS[method], y, grid(0.0, 1.0, n)) - exact).abs().max().item() for n in (8, 16)]
    assert order - 0.4 < np.log2(errors[0] / errors[1]) < order + 0.9


def dopri5_fp64(field, y, config):
    """One row, with numbers of Python's for everything that is not a state: the module's formulas, and the tableau written again."""
    c = [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]
    a = [
        [],
        [1 / 5],
        [3 / 40, 9 / 40],
        [44 / 45, -56 / 15, 32 / 9],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
    ]
    fourth = [5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40]
    t, h, before, steps, attempts = 0.0, config.first_step, 1e-4, 0, 0
    while t < config.t1 and attempts < config.max_steps:
        attempts += 1
        last = h >= config.t1 - t
        h = config.t1 - t if last else h
        k = []
        for part, weights in zip(c, a, strict=True):
            k.append(field(t + part * h, y + h * sum((w * s for w, s in zip(weights, k, strict=True)), np.zeros_like(y))))
        ahead = y + h * sum(w * s for w, s in zip(a[6], k, strict=False))
        other = y + h * sum(w * s for w, s in zip(fourth, k, strict=True))
        scale = config.atol + config.rtol * np.maximum(abs(y), abs(ahead))
        error = np.sqrt(np.mean(((ahead - other) / scale) ** 2))
        factor = min(10.0, max(0.2, 0.9 * max(error, 1e-8) ** -(0.2 - 0.75 * config.beta) * before**config.beta))
        if error <= 1:
            factor = factor if config.beta else max(1.0, factor)
            y, t, steps, before = ahead, config.t1 if last else t + h, steps + 1, max(error, 1e-4)
        else:
            factor = min(1.0, factor)
        h *= factor
    return y, steps, t >= config.t1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.0, "rtol": 1e-6, "atol": 1e-6},
        {"first_step": 3.0, "t1": 4.0, "rtol": 1e-5, "atol": 1e-5},  # rejections
        {"max_steps": 2, "rtol": 1e-5, "atol": 1e-5},  # does not arrive
    ],
)
@pytest.mark.parametrize("loop", [True, False])
def test_the_adaptive_method_is_the_formula(settings, loop):
    spec = ADAPTIVE.spec({**settings, "loop": loop, "max_steps": settings.get("max_steps", 24)})
    module = random_weights(spec, seed=4).double()
    y = 2 * torch.randn(4, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got, steps, finished = module(y)
    state = {key: value.numpy() for key, value in module.field.state_dict().items()}

    def field(t, y):
        h = np.tanh(state["state.weight"] @ y + state["state.bias"] + state["time.weight"][:, 0] * t)
        return state["rest.1.weight"] @ h + state["rest.1.bias"]

    assert steps.dtype == torch.int64
    assert finished.dtype == torch.bool
    for i in range(4):
        expected, count, arrived = dopri5_fp64(field, y[i].numpy(), module.config)
        assert (steps[i].item(), finished[i].item()) == (count, arrived)
        assert np.abs(got[i].numpy() - expected).max() < 1e-9
    assert finished.all() == ("max_steps" not in settings)


def test_rejections_happen_in_the_case_that_is_to_have_them():
    spec = ADAPTIVE.spec({"first_step": 3.0, "t1": 4.0, "rtol": 1e-5, "atol": 1e-5, "max_steps": 1})
    y = 2 * torch.randn(4, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got, steps, finished = random_weights(spec, seed=4).double()(y)
    assert torch.equal(got, y)
    assert not steps.any()
    assert not finished.any()


def test_a_row_does_not_depend_on_its_batch():
    module = random_weights(ADAPTIVE.spec({"rtol": 1e-5, "atol": 1e-5}), seed=4).double()
    y = torch.cat([torch.zeros(1, 8), 20 * torch.ones(1, 8)]).double()
    together, steps, _ = module(y)
    for i in range(2):
        alone, count, _ = module(y[i : i + 1])
        assert torch.allclose(alone[0], together[i], rtol=0, atol=1e-13)
        assert count[0] == steps[i]
    assert steps[0] != steps[1]


def test_the_forms_share_their_weights():
    names = ("neural-ode-tiny", "neural-ode-dopri5-tiny", "neural-ode-dopri5-unrolled-tiny")
    keys = [set(MODELS[name].spec().build().state_dict()) for name in names]
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.matrix
def test_the_loop_is_one_in_onnx():
    """One Loop, whose length varies with the input, and the same results at another batch."""
    spec = ADAPTIVE.spec({"rtol": 1e-5, "atol": 1e-5})
    module = random_weights(spec, seed=4)
    y = torch.randn(2, 8, generator=torch.Generator().manual_seed(5))
    program = trace(module, {"y": y}, dynamic=spec.dynamic, ranges=spec.ranges)
    model = to_onnx(program, opset=20, input_names=("y",), output_names=spec.outputs)
    assert sum(node.op_type == "Loop" for node in model.graph) == 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        y = 3 * torch.randn(batch, 8, generator=torch.Generator().manual_seed(6))
        expected = [value.numpy() for value in module(y)]
        got = session.run(list(spec.outputs), {"y": y.numpy()})
        assert np.abs(got[0] - expected[0]).max() < 1e-5 * np.ptp(expected[0])
        assert np.array_equal(got[1], expected[1])
        assert np.array_equal(got[2], expected[2])


def test_published_size():
    """208,266 parameters in the authors' example; the keys are its own."""
    for name in ("neural-ode-mnist", "neural-ode-dopri5-mnist"):
        with torch.device("meta"):
            module = MODELS[name].spec().build()
        assert sum(p.numel() for p in module.parameters()) == 208_266
        assert module.state_dict()["feature_layers.0.odefunc.conv1._layer.weight"].shape == (64, 65, 3, 3)


def test_the_net_for_pictures():
    """A small one: the adaptive form at a tight tolerance and many fixed steps agree, and the time reaches the convolutions."""
    fixed = random_weights(MODELS["neural-ode-mnist"].spec({"channels": 4, "steps": 32}), seed=1).double()
    adaptive = random_weights(
        MODELS["neural-ode-dopri5-mnist"].spec({"channels": 4, "rtol": 1e-6, "atol": 1e-6, "max_steps": 100}), seed=1
    ).double()
    image = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits, steps, finished = adaptive(image)
    assert finished.all()
    assert (steps > 3).all()
    assert (logits - fixed(image)).abs().max() < 1e-3 * logits.abs().max()  # ReLU's kinks hold the orders down
    field, x = fixed.feature_layers[0].odefunc, torch.randn(2, 144, dtype=torch.float64)
    assert (field(torch.zeros(1, 1).double(), x) - field(torch.ones(2, 1).double(), x)).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [{"method": "rk5"}, {"steps": 0}, {"rtol": 0.0}, {"beta": 0.2}, {"max_steps": 0}, {"t1": -1.0}])
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY.config, **settings)
