"""Attention a head at a time, and those that stay whole: in float64 the program before and after gives the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch.nn.functional as F

from isthmus.targets.coreml.layout import left, split_einsum, to_ane


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rewrites = _load("rewrites")
normal, operators, assert_left = rewrites.normal, rewrites.operators, rewrites.assert_left


ATTENTIONS = {
    "rank 3": ((2, 6, 8), (2, 5, 8), (2, 5, 8), {}),
    "one head": ((2, 1, 6, 8), (2, 1, 5, 8), (2, 1, 5, 8), {}),
    "values of another width": ((2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 5, 3), {}),
    "grouped queries": ((2, 6, 6, 8), (2, 2, 5, 8), (2, 2, 5, 8), {"enable_gqa": True}),
    "one head of keys for all": ((2, 4, 6, 8), (2, 1, 5, 8), (2, 1, 5, 8), {}),
    "scale": ((2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 5, 8), {"scale": 0.1}),
    "causal": ((2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 5, 8), {"is_causal": True}),
    "causal, more keys": ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8), {"is_causal": True}),
    "causal, rank 3": ((2, 6, 8), (2, 6, 8), (2, 6, 8), {"is_causal": True}),
    "one picture, query and key": ((1, 1, 1, 8), (1, 1, 1, 8), (1, 1, 1, 8), {}),
}


def test_attentions(function, exported, same) -> None:
    def call(_, *given):
        for i, (*_, options) in enumerate(ATTENTIONS.values()):
            yield F.scaled_dot_product_attention(*given[3 * i : 3 * i + 3], **options)

    inputs = [normal(*shape, seed=i) for *shapes, _ in ATTENTIONS.values() for i, shape in enumerate(shapes)]
    program = exported(function(lambda *given: tuple(call(*given))), *inputs)
    result = split_einsum(program)
    assert "scaled_dot_product_attention" not in operators(result)
    assert not left(result, split=True)
    same(result, program, *inputs)
    same(to_ane(program), program, *inputs)


def test_masks_of_attention_of_rank_3(function, exported, same) -> None:
    masks = [normal(*shape) > -0.5 for shape in [(2, 6, 5), (1, 6, 5), (6, 5), (2, 1, 5)]]
    inputs = (normal(2, 6, 8), normal(2, 5, 8, seed=1), normal(2, 5, 8, seed=2), *masks)
    program = exported(function(lambda _, q, k, v, *given: [F.scaled_dot_product_attention(q, k, v, mask) for mask in given]), *inputs)
    result = split_einsum(program)
    assert "scaled_dot_product_attention" not in operators(result)
    same(result, program, *inputs)


STAYING_ATTENTIONS = [
    (((6, 8), (5, 8), (5, 8)), "ranks 2"),
    (((2, 2, 2, 6, 8), (2, 2, 2, 5, 8), (2, 2, 2, 5, 8)), "ranks 5"),
    (((2, 4, 6, 8), (1, 4, 5, 8), (1, 4, 5, 8)), "batches or heads"),
    (((2, 1, 6, 8), (2, 4, 5, 8), (2, 4, 5, 8)), "batches or heads"),
]


def test_attentions_that_stay(function, exported, same) -> None:
    inputs = [normal(*shape, seed=i) for shapes, _ in STAYING_ATTENTIONS for i, shape in enumerate(shapes)]
    calls = range(0, len(inputs), 3)
    program = exported(function(lambda _, *given: [F.scaled_dot_product_attention(*given[i : i + 3]) for i in calls]), *inputs)
    result = split_einsum(to_ane(program))
    assert_left(result, [why for _, why in STAYING_ATTENTIONS], split=True)
    assert not left(result)
    same(result, program, *inputs)
