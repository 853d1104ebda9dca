"""Look-ups as products, and those that stay: in float64 the program before and after gives the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from isthmus.targets.coreml.layout import to_ane
from isthmus.targets.coreml.layout.gather import gather_as_product


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rewrites = _load("rewrites")
normal, operators, every, assert_left = rewrites.normal, rewrites.operators, rewrites.every, rewrites.assert_left


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tables(dtype: torch.dtype, function, exported, same) -> None:
    def call(m, *ys):
        return tuple(F.embedding(y, m.table, padding_idx=padding) for y in ys for padding in (None, 0, -1))

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(0, 10, shape, generator=generator).to(dtype) for shape in [(), (3,), (2, 5), (2, 3, 4)]]
    program = exported(function(call, table=normal(10, 8)), *inputs)
    result = to_ane(program)
    assert "embedding" not in operators(result)
    same(result, program, *inputs)
    for number in (0, 9):
        same(result, program, *(torch.full_like(y, number) for y in inputs))


def test_a_table_that_is_the_last_layer_too(function, exported, same) -> None:
    module = function(lambda m, y: F.linear(F.embedding(y, m.table), m.table), table=normal(10, 8))
    program = exported(module, torch.tensor([[1, 2], [3, 9]]))
    result = to_ane(program)
    assert operators(result) <= {"_to_copy", "eq", "reshape", "conv2d", "permute"}
    same(result, program, torch.tensor([[0, 0], [9, 1]]))


def test_two_look_ups_in_one_table(function, exported, same) -> None:
    module = function(lambda m, y, z: F.embedding(y, m.table) + F.embedding(z, m.table), table=normal(10, 8))
    y, z = torch.tensor([1, 2, 3]), torch.tensor([0, 9, 4])
    program = exported(module, y, z)
    result = to_ane(program)
    assert "embedding" not in operators(result)
    assert len(result.constants) == 2, "the rows' numbers, and the table transposed"
    same(result, program, z, y)


FIXED = [
    lambda m, x: x[m.places],
    lambda m, x: x[:, m.places],
    lambda m, x: x[..., m.places],
    lambda m, x: x[:, m.table],
    lambda m, x: x[:, m.table[0, 1]],
    lambda _, x: x[:, [2, 0, -1, -3]],
    lambda m, x: x.index_select(-2, m.places % 3),
    lambda m, x: x.index_select(2, m.table.flatten() % 3),
    lambda _, x: x[:, torch.arange(3) * 2 % 3],
    lambda m, x: m.weight[m.places] * x,
]


def test_fixed_places(function, exported, rewritten, same) -> None:
    stored = {"places": torch.tensor([2, -1, 0]), "table": torch.tensor([[0, 1], [-3, 2]]), "weight": normal(3, 4)}
    program = exported(function(every(FIXED), **stored), normal(3, 3, 4))
    assert operators(program) & {"index", "index_select"}
    result = rewritten(program, gather_as_product)
    assert not operators(result) & {"index", "index_select"}
    same(result, program, normal(3, 3, 4, seed=1))


STAYING_LOOK_UPS = [
    (lambda m, _x, y: F.embedding(y, m.weight * 2), "its table is computed at run time"),
    (lambda m, _x, y: F.embedding(y, m.masks).clamp(min=-1), "infinite numbers"),
    (lambda m, _x, y: F.embedding(y, m.long), "2049 rows"),
    (lambda _, x, y: x[y], "computed at run time"),
    (lambda m, x, _y: x[m.places, m.places], "several indices"),
    (lambda m, _x, y: y[m.places], "integers"),
    (lambda m, x, _y: F.pad(x, (0, 2049))[:, m.places], "2053 places"),
]


def test_look_ups_that_stay(function, exported, same) -> None:
    stored = {"weight": normal(3, 4), "masks": normal(3, 4).masked_fill(normal(3, 4) > 1, -torch.inf), "long": normal(2049, 1)}
    calls, whys = zip(*STAYING_LOOK_UPS, strict=True)
    program = exported(function(every(calls), places=torch.tensor([1, 0]), **stored), normal(3, 4), torch.tensor([0, 2, 1]))
    result = to_ane(program)
    assert_left(result, whys)
    same(result, program, normal(3, 4, seed=1), torch.tensor([2, 2, 0]))


def test_random_numbers_are_no_constants(function, exported) -> None:
    program = exported(function(lambda _, x: x[torch.randint(0, 3, (2,))]), normal(3, 4))
    assert "index" in operators(to_ane(program))
