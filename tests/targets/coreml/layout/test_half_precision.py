"""After conversion, with float16 numbers, at values that are hard in it: against float64 formulas, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.targets.coreml.convert import convert
from isthmus.targets.coreml.interpreter import Interpreter, load
from isthmus.targets.coreml.interpreter.program import operations_in
from isthmus.targets.coreml.layout import split_einsum, to_ane

EPSILON = 2.0**-11
"""The largest relative error of rounding to float16."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(channels: int) -> torch.Tensor:
    """(1, 8, channels): rows with every kind of number that float16 has, rounded to it."""
    x = normal(1, 8, channels)
    x[:, 0] = 60000.0
    x[:, 1] = 60000.0 * normal(channels, seed=1).sign()
    x[:, 2] = 0.0
    x[:, 3] *= 1e-4
    x[:, 4] = 0.0
    x[:, 4, 0] = 60000.0
    x[:, 5] = 6e-8 * (torch.arange(channels) % 2)  # the smallest number of all
    x[:, 6] = x[:, 6] * 256  # whose squares are too large
    return x.half().float()


def kinds(loaded: object) -> set[str]:
    return {operation.op_type for function in loaded.functions.values() for operation in operations_in(function)} - {"const"}


@pytest.mark.parametrize("eps", [1e-6, 1e-12, None])
def test_rms_norm_of_every_number_of_float16(eps: float | None, function, exported, in_core_ml) -> None:
    channels = 96
    weight = normal(channels, seed=2).half().float()
    program = exported(function(lambda m, x: F.rms_norm(x, (channels,), m.weight, eps), weight=weight), normal(1, 8, channels))
    (got,) = in_core_ml(to_ane(program), rows(channels))
    x = rows(channels).double()
    expected = x / (x.square().mean(-1, keepdim=True) + (torch.finfo(torch.float32).eps if eps is None else eps)).sqrt() * weight.double()
    # Seven roundings between x and the result, of which two count half under the root; subnormal numbers are exact to 2^-25.
    np.testing.assert_allclose(got, expected.numpy(), rtol=6 * EPSILON, atol=2e-3 if eps == 1e-12 else 1e-6)
    assert np.all(got[:, 2] == 0.0), "a row of zeros is zeros"


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_one_operation_over_the_channels(affine: bool, exported, in_core_ml) -> None:
    """Between layers that hand on what they are given, so that the norm is inside the layout."""
    norm = nn.LayerNorm(96, eps=1e-5, elementwise_affine=affine)
    layers = [nn.Linear(96, 96, bias=False) for _ in range(2)]
    for layer in layers:
        layer.weight.data.copy_(torch.eye(96))
    if affine:
        norm.weight.data.copy_(normal(96, seed=3).half())
        norm.bias.data.copy_(normal(96, seed=4).half())
    model: list[object] = []
    (got,) = in_core_ml(to_ane(exported(nn.Sequential(layers[0], norm, layers[1]), normal(1, 8, 96))), rows(96), model=model)
    assert kinds(model[0]) <= {"cast", "transpose", "reshape", "expand_dims", "squeeze", "layer_norm", "conv"}
    assert [o.axes.val.tolist() for f in model[0].functions.values() for o in operations_in(f) if o.op_type == "layer_norm"] == [[1]]
    x = rows(96).double()
    expected = F.layer_norm(x, (96,), *((norm.weight.double(), norm.bias.double()) if affine else ()), eps=1e-5).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=4 * EPSILON, atol=4e-3)


def test_linear_layers_are_convolutions_with_stored_weights(exported, in_core_ml) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    module, x = Twice(), normal(2, 6, 32).half().float()
    model: list[object] = []
    program = exported(module, x)
    (got,) = in_core_ml(to_ane(program), x, precision="fp32", model=model)
    convolutions = [o for f in model[0].functions.values() for o in operations_in(f) if o.op_type == "conv"]
    assert [tuple(o.weight.shape) for o in convolutions] == [(32, 32, 1, 1)] * 2
    assert all(o.weight.val is not None for o in convolutions), "the engine has no convolution with weights of run time"
    assert len({o.weight.name for o in convolutions}) == 1, "stored once"
    np.testing.assert_allclose(got, module(x).detach().numpy(), rtol=0, atol=1e-5)
    assert not kinds(model[0]) & {"linear", "matmul"}


def test_sums_and_look_ups(function, exported, in_core_ml) -> None:
    def call(m, x, y):
        return x.cumsum(1), F.embedding(y, m.table), x[:, m.places]

    table = (normal(2048, 4) * 60000).clamp(-60000, 60000).half().float()
    module = function(call, table=table, places=torch.tensor([5, -1, 0]))
    x = torch.randint(-9, 9, (2, 6, 8), generator=torch.Generator().manual_seed(0)).float()
    y = torch.tensor([0, 1, 1023, 2046, 2047])
    model: list[object] = []
    sums, looked_up, fixed = in_core_ml(to_ane(exported(module, x, y)), x, y, model=model)
    np.testing.assert_array_equal(sums, x.numpy().cumsum(1), "sums of integers below 2048 are exact")
    np.testing.assert_array_equal(looked_up, table[y].numpy())
    np.testing.assert_array_equal(fixed, x[:, [5, 5, 0]].numpy())
    assert not kinds(model[0]) & {"gather", "gather_nd", "gather_along_axis", "cumsum"}


# Attention and masks.

HOLED = torch.ones(6, 6, dtype=torch.bool).tril()
HOLED[3] = False


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> np.ndarray:
    """Zeros for a query that sees nothing, as in PyTorch."""
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v.double()).numpy()


@pytest.mark.parametrize("split", [True, False])
def test_attention_with_masks(split: bool, function, exported, in_core_ml) -> None:
    def call(m, q, k, v, mask, added):
        return (
            F.scaled_dot_product_attention(q, k, v, mask),
            F.scaled_dot_product_attention(q, k, v, added),
            F.scaled_dot_product_attention(q, k, v, m.stored),
            F.scaled_dot_product_attention(q, k, v, is_causal=True),
        )

    q, k, v = (normal(2, 2, 6, 16, seed=i).half().float() for i in range(3))
    q = (q * 30).half().float()  # scores to 100
    keys = torch.tensor([1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0]).bool().reshape(2, 1, 1, 6)
    added = torch.zeros(2, 1, 1, 6).masked_fill(~keys, -torch.inf)
    inputs = (q, k, v, HOLED, added)
    program = exported(function(call, stored=HOLED), *inputs)
    laid_out = split_einsum(to_ane(program)) if split else to_ane(program)
    model: list[object] = []
    results = in_core_ml(laid_out, *inputs, model=model)
    assert ("einsum" in kinds(model[0])) == split
    masks = (HOLED, keys, HOLED, torch.ones(6, 6, dtype=torch.bool).tril())
    for got, mask in zip(results, masks, strict=True):
        expected = attended(q, k, v, mask, 0.25)
        # A score of 100 is rounded to 1/32, so weights are off by as much.
        np.testing.assert_allclose(got, expected, rtol=0, atol=0.05)
        rows_seen = mask.expand(2, 2, 6, 6).any(-1).numpy()
        assert np.all(got[~rows_seen] == 0.0)


def test_masked_softmaxes(function, exported, in_core_ml) -> None:
    def call(m, x, mask):
        return (
            torch.where(mask, x, -torch.inf).softmax(-1),
            (x + (1 - mask.float()) * torch.finfo(torch.float32).min).softmax(-1),
            (x + m.table).softmax(-1),
        )

    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    module = function(call, table=torch.zeros(6, 6).masked_fill(~mask, torch.finfo(torch.float32).min))
    x = (normal(2, 6, 6) * 1000).half().float()
    for got in in_core_ml(to_ane(exported(module, x, mask)), x, mask):
        expected = x.double().masked_fill(~mask, -torch.inf).softmax(-1).numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=2 * EPSILON)


def test_states_are_kept_in_the_layout(exported) -> None:
    class Accumulating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("total", torch.zeros(2, 6, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.mul_(0.5)
            self.total.add_(self.layer(x))
            return self.layer(self.total)

    module = Accumulating()
    interpreter = Interpreter(load(convert(to_ane(exported(module, torch.zeros(2, 6, 8))), "fp16")))
    assert list(interpreter.states) == ["total"]
    states: dict[str, np.ndarray] = {}
    weight, bias = module.layer.weight.detach().double().numpy(), module.layer.bias.detach().double().numpy()
    total = np.zeros((2, 6, 8))
    for seed in range(3):
        x = normal(2, 6, 8, seed=seed).half().float().numpy()
        (got,) = interpreter.run(dict.fromkeys(interpreter.inputs, x), states).values()
        total = total * 0.5 + x @ weight.T + bias
        np.testing.assert_allclose(got, total @ weight.T + bias, rtol=0, atol=8 * EPSILON)
