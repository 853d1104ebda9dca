"""Linear layers as convolutions, and those that stay: in float64 the program before and after gives the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.targets.coreml.layout import left, to_ane
from isthmus.targets.coreml.layout.linear import linear_as_convolution


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rewrites = _load("rewrites")
normal, operators, every, assert_left = rewrites.normal, rewrites.operators, rewrites.every, rewrites.assert_left


def test_linear_layers(function, exported, rewritten, same) -> None:
    inputs = [normal(*shape) for shape in [(3, 8), (1, 8), (2, 6, 8), (2, 3, 4, 8), (2, 1, 3, 2, 8), (1, 1, 8)]]

    def call(m, *xs):
        return tuple(F.linear(x, weight, bias) for x in xs for weight, bias in ((m.weight, m.bias), (m.other, None)))

    program = exported(function(call, weight=normal(5, 8), bias=normal(5), other=normal(1, 8, seed=1)), *inputs)
    result = rewritten(program, linear_as_convolution)
    assert operators(result) <= {"conv2d", "permute", "reshape"}
    assert not left(result)
    same(result, program, *inputs)


def test_a_layer_of_its_own(exported, rewritten, same) -> None:
    """Its weight changes its shape, under its name; the input is called `input`, as a function of Python's is."""
    program = exported(nn.Linear(8, 5), torch.ones(2, 6, 8))
    result = rewritten(program, linear_as_convolution)
    assert {name: tuple(value.shape) for name, value in result.state_dict.items()} == {"weight": (5, 8, 1, 1), "bias": (5,)}
    assert [str(name) for name in result.graph_signature.user_inputs] == ["input"]
    assert program.state_dict["weight"].shape == (5, 8)
    same(result, program, torch.ones(2, 6, 8))


def test_a_bias_that_is_computed(function, exported, rewritten, same) -> None:
    program = exported(function(lambda m, x, b: F.linear(x, m.weight, b), weight=normal(5, 8)), normal(2, 6, 8), normal(5))
    result = rewritten(program, linear_as_convolution)
    assert "linear" not in operators(result)
    same(result, program, normal(2, 6, 8), normal(5, seed=1))


def _own(m, x):
    return F.linear(m.weight, m.weight) + x.sum()


SHARING = [
    lambda m, x: F.linear(F.linear(x, m.weight), m.weight),
    lambda m, x: F.linear(x, m.weight) + m.weight,
    lambda m, x: (F.linear(x, m.weight), m.weight),
    lambda m, x: F.linear(x, m.weight) * F.linear(x + 1, m.weight, m.weight[0]),
    _own,
]


@pytest.mark.parametrize("call", SHARING)
def test_a_weight_that_is_read_more_than_once(call, function, exported, rewritten, same) -> None:
    program = exported(function(call, weight=normal(8, 8)), normal(8, 8))
    result = rewritten(program, linear_as_convolution)
    assert "linear" not in operators(result)
    assert result.state_dict["weight"].shape == (8, 8), "others read it in its own shape"
    same(result, program, normal(8, 8, seed=1))
    assert program.state_dict["weight"].shape == (8, 8)


STAYING_LAYERS = [
    (lambda m, x: F.linear(x, m.weight * 2), "its weight is computed at run time"),
    (lambda m, x: F.linear(x, m.weight[0]), "its weight is computed at run time"),
    (lambda m, x: F.linear(x, m.vector), "its weight has rank 1"),
    (lambda m, x: F.linear(x, m.weight, m.scalar), "its bias is no vector"),
    (lambda m, x: F.linear(x[0], m.weight), "its input has no batch"),
    (lambda m, x: F.linear(x[:0], m.weight), "its input is empty"),
]


def test_linear_layers_that_stay(function, exported, same) -> None:
    calls, whys = zip(*STAYING_LAYERS, strict=True)
    program = exported(function(every(calls), weight=normal(5, 8), vector=normal(8), scalar=normal(1)[0]), normal(6, 8))
    result = to_ane(program)
    assert_left(result, whys)
    assert all(reason.what.startswith("linear stays as it is: ") for reason in left(result))
    assert left(program) == left(result), "it is known before"
    same(result, program, normal(6, 8, seed=1))


def test_a_reason_names_the_module(exported) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight * 2, self.bias)

    program = exported(nn.Sequential(nn.Linear(8, 8), nn.Sequential(Scaled(8, 4))), torch.zeros(2, 8))
    assert [reason.where for reason in left(program)] == ["1.0"]
