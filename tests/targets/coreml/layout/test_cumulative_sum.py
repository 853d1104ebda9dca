"""Cumulative sums as products, and those that stay: in float64 the program before and after gives the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F

from isthmus.targets.coreml.layout import to_ane
from isthmus.targets.coreml.layout.cumulative_sum import cumulative_sum_as_product


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rewrites = _load("rewrites")
normal, operators, every, assert_left = rewrites.normal, rewrites.operators, rewrites.every, rewrites.assert_left


def test_cumulative_sums_over_each_axis(function, exported, rewritten, same) -> None:
    inputs = [normal(*shape) for shape in [(7,), (3, 5), (2, 6, 8), (2, 3, 4, 5), (2, 1, 4)]]
    program = exported(function(lambda _, *xs: tuple(x.cumsum(axis) for x in xs for axis in range(-x.dim(), x.dim()))), *inputs)
    result = rewritten(program, cumulative_sum_as_product)
    assert "cumsum" not in operators(result)
    same(result, program, *inputs)


def test_cumulative_sums_from_the_end(function, exported, same) -> None:
    calls = [lambda _, x, axis=axis: x.flip(axis).cumsum(axis).flip(axis) - x.cumsum(axis) for axis in (0, 1, -1)]
    program = exported(function(every(calls)), normal(2, 6, 8))
    result = to_ane(program)
    assert "cumsum" not in operators(result)
    same(result, program, normal(2, 6, 8, seed=1))


def test_equal_sums_share_a_matrix(function, exported, rewritten) -> None:
    program = exported(function(lambda _, x: x.cumsum(0) + x.cumsum(1)), normal(4, 4))
    assert len(rewritten(program, cumulative_sum_as_product).constants) == 1


STAYING_SUMS = [
    (lambda _, x: (x > 0).cumsum(1), "integers"),
    (lambda _, x: (x * 9).long().cumsum(1), "integers"),
    (lambda _, x: x.cumsum(1, dtype=torch.float32), "another dtype"),
    (lambda _, x: x.sum().cumsum(0), "no axis"),
    (lambda _, x: F.pad(x, (0, 2049 - 8)).cumsum(1), "2049 elements"),
]


def test_cumulative_sums_that_stay(function, exported, same) -> None:
    calls, whys = zip(*STAYING_SUMS, strict=True)
    program = exported(function(every(calls)), normal(6, 8))
    result = to_ane(program)
    assert_left(result, whys)
    same(result, program, normal(6, 8, seed=1))
