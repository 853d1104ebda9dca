"""Masks of finite numbers, before softmaxes and in attention: in float64 the program before and after gives the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from isthmus.targets.coreml.layout import split_einsum, to_ane
from isthmus.targets.coreml.layout.graph import operator_of, text
from isthmus.targets.coreml.layout.masks import finite_masks
from isthmus.targets.coreml.layout.split_attention import attention_by_heads


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rewrites = _load("rewrites")
normal, operators, every = rewrites.normal, rewrites.operators, rewrites.every


CAUSAL = torch.ones(6, 5, dtype=torch.bool).tril()
HOLED = CAUSAL.clone()
HOLED[3] = False  # a query that sees nothing


MASKING = [
    lambda _, x, mask: torch.where(mask, x, -torch.inf).softmax(-1),
    lambda _, x, mask: x.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1),
    lambda _, x, mask: x.masked_fill(~mask, torch.tensor(-torch.inf)).softmax(-1),
    lambda _, x, mask: (x + torch.zeros(6, 5, dtype=torch.float64).masked_fill(~mask, -1e9)).softmax(-1),
    lambda _, x, mask: (x + (1 - mask.double()) * -3e38).softmax(-1),
    lambda _, x, mask: (x + (1 - mask.long()[None].double()) * torch.finfo(torch.float64).min).softmax(-1),
    lambda _, x, _mask: (x + torch.full((6, 5), -torch.inf, dtype=torch.float64).triu(1)).softmax(-1),
    lambda m, x, _mask: (x + m.table).softmax(-1),
    lambda m, x, _mask: ((x + m.table).view(2, 1, 6, 5) + m.table[None]).squeeze(1).transpose(1, 2).softmax(1),
    lambda _, x, mask: torch.softmax(torch.where(mask[None], x, torch.full_like(x, -torch.inf)), dim=-1),
]


def test_masks_of_softmaxes(function, exported, rewritten, same) -> None:
    module = function(every(MASKING), table=torch.zeros(6, 5, dtype=torch.float64).masked_fill(~CAUSAL, -torch.inf))
    program = exported(module, normal(2, 6, 5), CAUSAL)
    result = rewritten(program, finite_masks)
    assert lowest(program) == -torch.inf
    assert lowest(result) == -40000
    same(result, program, normal(2, 6, 5, seed=1) * 20, CAUSAL)


def lowest(program: torch.export.ExportedProgram) -> float:
    """The lowest number that the program computes with: of its calls, and of the tensors that they read."""
    nodes = {node.name: node for node in program.graph.nodes}
    calls = [node for node in nodes.values() if node.op == "call_function" and operator_of(node) != "gt"]
    numbers = [a for node in calls for a in node.args if isinstance(a, int | float)]
    stored = {**program.state_dict, **program.constants}
    read = [stored[spec.target] for spec in program.graph_signature.input_specs if spec.target and nodes[spec.arg.name].users]
    return float(min([*numbers, *(value.min().item() for value in read)]))


def _both(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1) + scores


NOT_MASKING = [
    lambda _, x, mask: torch.where(mask, x, -1e9),
    lambda _, x, mask: _both(torch.where(mask, x, -1e9)),
    lambda _, x, _mask: (x * -1e9).softmax(-1),
    lambda _, x, mask: torch.where(mask, x, -1e9).amax(-1),
    lambda _, x, mask: (x.masked_fill(mask, -1e9) * 1e-9).softmax(-1),
    lambda m, x, _mask: (x + m.table, (x + m.table).softmax(-1))[0],
]


def test_numbers_that_do_not_mask_stay(function, exported, rewritten, same) -> None:
    module = function(every(NOT_MASKING), table=torch.zeros(6, 5, dtype=torch.float64).masked_fill(~CAUSAL, -1e9))
    program = exported(module, normal(2, 6, 5), CAUSAL)
    result = rewritten(program, finite_masks)
    assert text(result) == text(program)
    same(result, program, normal(2, 6, 5, seed=1), CAUSAL)


def test_a_row_that_a_softmax_masks_whole_is_finite(function, exported, rewritten) -> None:
    program = exported(function(lambda _, x, mask: torch.where(mask, x, -torch.inf).softmax(-1)), normal(2, 6, 5), HOLED)
    weights = rewritten(program, finite_masks).module()(normal(2, 6, 5), HOLED)
    torch.testing.assert_close(weights[:, 3], torch.full((2, 5), 0.2, dtype=torch.float64))


def _float(mask: torch.Tensor, low: float = -torch.inf) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)


MASKS = {
    "queries and keys": CAUSAL,
    "a query that sees nothing": HOLED,
    "keys of each picture": torch.tensor([[[[1, 1, 0, 0, 0]]], [[[0, 0, 0, 0, 0]]]]).bool(),
    "queries of each picture": torch.tensor([1, 0, 1, 1, 0, 1]).bool().reshape(1, 1, 6, 1).expand(2, 1, 6, 1).clone(),
    "heads": (normal(2, 2, 6, 5) > 0.5),
    "heads of all pictures": (normal(2, 6, 5) > -0.5),
    "one number": torch.tensor(True).reshape(1, 1),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_attention(name: str, function, exported, same) -> None:
    mask = MASKS[name]
    # A row of low numbers only is a mixture of all values, in PyTorch too; in which proportions depends on how low they are.
    mixed = not mask.any(-1).all()
    given = [mask, _float(mask), *([] if mixed else [_float(mask, torch.finfo(torch.float32).min)])]

    def call(m, q, k, v, *masks):
        return tuple(F.scaled_dot_product_attention(q, k, v, each) for each in (*masks, m.stored, m.numbers))

    inputs = (normal(2, 2, 6, 8), normal(2, 2, 5, 8, seed=1), normal(2, 2, 5, 8, seed=2), *given)
    program = exported(function(call, stored=mask, numbers=_float(mask)), *inputs)
    for result in (to_ane(program), split_einsum(program)):
        assert lowest(result) >= -40000
        same(result, program, *inputs)
    assert "scaled_dot_product_attention" not in operators(result)


def operator_of_call(node: torch.fx.Node) -> str:
    return operator_of(node) if node.op == "call_function" else ""


def test_a_mask_is_checked_for_empty_rows_only_where_it_may_have_some(function, exported, rewritten) -> None:
    def products(*masks: torch.Tensor, **stored: torch.Tensor) -> int:
        def call(m, x, *given):
            flags = (1 - given[0].double()) * -1e4 if given and given[0].dtype == torch.long else None
            return F.scaled_dot_product_attention(x, x, x, m.stored if stored else flags if flags is not None else given[0])

        program = rewritten(exported(function(call, **stored), normal(2, 4, 6, 8), *masks), finite_masks)
        (attention,) = (node for node in program.graph.nodes if operator_of_call(node) == "scaled_dot_product_attention")
        return sum(operator_of(user) == "mul" for user in attention.users if user.op == "call_function")

    square = torch.ones(6, 6, dtype=torch.bool).tril()
    holed = square.clone()
    holed[2] = False
    assert products(square) == products(_float(square)) == 1, "known at run time only"
    assert products(stored=holed) == products(stored=_float(holed)) == 1
    assert products(stored=square) == products(stored=_float(square)) == products(stored=_float(holed, -1e9)) == 0
    assert products(square.long()) == 0, "computed, of finite numbers"


def test_layers_share_what_is_made_of_their_mask(function, exported, rewritten, same) -> None:
    def call(m, x, mask):
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, mask)
            x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x

    mask = normal(2, 1, 6, 6) > -0.5
    program = exported(function(call), normal(2, 4, 6, 8), mask)
    result = rewritten(program, finite_masks)
    calls = [operator_of(node) for node in result.graph.nodes if node.op == "call_function"]
    assert {name: calls.count(name) for name in ("where", "amax", "full")} == {"where": 1, "amax": 1, "full": 2}
    assert len(result.constants) == 1
    same(rewritten(program, finite_masks, attention_by_heads), program, normal(2, 4, 6, 8, seed=1), mask)
