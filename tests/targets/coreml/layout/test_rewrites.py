"""Every rewrite over the calls that it takes, and those that it leaves: in float64 both programs give the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.targets.coreml.layout import left, split_einsum, to_ane
from isthmus.targets.coreml.layout.cumulative_sum import cumulative_sum_as_product
from isthmus.targets.coreml.layout.gather import gather_as_product
from isthmus.targets.coreml.layout.graph import operator_of, text
from isthmus.targets.coreml.layout.layer_norm import layer_norm_over_channels
from isthmus.targets.coreml.layout.linear import linear_as_convolution
from isthmus.targets.coreml.layout.masks import finite_masks
from isthmus.targets.coreml.layout.rms_norm import safe_rms_norm
from isthmus.targets.coreml.layout.split_attention import attention_by_heads


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operator_of_call(node: torch.fx.Node) -> str:
    return operator_of(node) if node.op == "call_function" else ""


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {operator_of(node) for node in program.graph.nodes if node.op == "call_function"}


# Linear layers.


def every(calls):
    """A function whose results are those of all the calls."""
    return lambda *given: tuple(call(*given) for call in calls)


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


def assert_left(program: torch.export.ExportedProgram, whys: list[str], **options: bool) -> None:
    reasons = left(program, **options)
    assert len(reasons) == len(whys)
    for reason, why in zip(reasons, whys, strict=True):
        assert why in reason.what


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


# Norms.

_SHAPES = [((2, 6, 8), (8,)), ((3, 8), (8,)), ((2, 3, 4, 8), (8,)), ((2, 3, 4, 8), (4, 8)), ((2, 4, 8), (2, 4, 8)), ((1, 1, 1), (1,))]


@pytest.mark.parametrize("affine", ["", "weight", "weight and bias", "computed"])
def test_layer_norms(affine: str, function, exported, rewritten, same) -> None:
    def call(m, *xs):
        for x, (_, axes) in zip(xs, _SHAPES, strict=True):
            size = torch.Size(axes).numel()
            weight, bias = m.weight[:size].reshape(axes) if affine else None, m.bias[:size].reshape(axes) if "bias" in affine else None
            if size == 8 and affine != "computed":
                weight, bias = m.eight if affine else None, m.eight if "bias" in affine else None
            yield F.layer_norm(x, axes, weight, bias, 1e-3)

    module = function(lambda *given: tuple(call(*given)), weight=normal(64), bias=normal(64, seed=1), eight=normal(8))
    inputs = [normal(*shape, seed=2) * 3 + 1 for shape, _ in _SHAPES]
    program = exported(module, *inputs)
    result = rewritten(program, layer_norm_over_channels)
    assert "layer_norm" not in operators(result)
    inputs[0][0] = 2.0  # of variance 0
    same(result, program, *inputs, bound=1e-12)


def test_rms_norms(function, exported, rewritten, same) -> None:
    def call(m, *xs):
        for x, (_, axes) in zip(xs, _SHAPES, strict=True):
            for weight in (None, m.eight if axes == (8,) else m.weight[: torch.Size(axes).numel()].reshape(axes)):
                yield F.rms_norm(x, axes, weight, 1e-6)
        for eps in (None, 1e-3, 1e-12, 1e-20):
            yield F.rms_norm(xs[0], (8,), m.eight, eps)

    module = function(lambda *given: tuple(call(*given)), weight=normal(64), eight=normal(8))
    program = exported(module, *(normal(*shape) for shape, _ in _SHAPES))
    result = rewritten(program, safe_rms_norm)
    assert "rms_norm" not in operators(result)
    for scale in (1.0, 60000.0, 1e-4, 1e-8):
        inputs = [normal(*shape, seed=2) * scale for shape, _ in _SHAPES]
        for x in inputs[:4]:
            x[0] = 0.0  # rows of zeros
        same(result, program, *inputs, bound=1e-12)


def test_norms_that_share_a_weight(function, exported, rewritten, same) -> None:
    def call(m, x):
        x = F.layer_norm(x, (8,), m.weight, m.weight)
        return F.layer_norm(F.rms_norm(F.rms_norm(x, (8,), m.weight, 1e-3), (8,), m.weight, 1e-3), (8,), m.weight)

    program = exported(function(call, weight=normal(8)), normal(2, 6, 8))
    result = rewritten(program, safe_rms_norm, layer_norm_over_channels)
    assert not operators(result) & {"layer_norm", "rms_norm"}
    same(result, program, normal(2, 6, 8))


def test_norms_that_stay(exported, same) -> None:
    size = 16385
    program = exported(nn.Sequential(nn.LayerNorm(size), nn.RMSNorm([2, size]), nn.Flatten(0), nn.LayerNorm(2 * size)), torch.ones(2, size))
    reasons = left(program)
    assert sorted(reason.what for reason in reasons) == [
        "layer_norm stays as it is: it is over 16385 numbers, and the Neural Engine takes 16384 channels",
        "layer_norm stays as it is: it is over 32770 numbers, and the Neural Engine takes 16384 channels",
        "rms_norm stays as it is: it is over 32770 numbers, and the Neural Engine takes 16384 channels",
    ]
    result = to_ane(program)
    assert left(result) == reasons
    same(result, program, torch.ones(2, size))
    short = exported(nn.LayerNorm(8), torch.ones(8))
    assert [reason.what for reason in left(to_ane(short))] == ["layer_norm stays as it is: its input has no batch"]


# Cumulative sums.


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


# Look-ups.


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


# Masks.

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


# Attention.


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
