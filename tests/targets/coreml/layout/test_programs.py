"""Whole programs: what goes in and comes out stays as it was, whatever is done between."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from isthmus.exporter.errors import UnsupportedError
from isthmus.targets.coreml.layout import left, split_einsum, to_ane, unsupported
from isthmus.targets.coreml.layout.graph import Editor, operator_of, scope_of, text
from isthmus.targets.coreml.layout.settle import settle


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [operator_of(node) for node in program.graph.nodes if node.op == "call_function"]


class Recurrent(nn.Module):
    """Changes a buffer that layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("state", torch.zeros(2, 8))
        self.register_buffer("weight", torch.eye(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.layer(x + self.state)
        self.weight.mul_(0.5)
        self.state.copy_(state)
        return F.linear(state, self.weight)


def test_buffers_that_change(exported) -> None:
    programs = [exported(Recurrent().double(), normal(2, 8)) for _ in range(2)]
    for program in programs:
        for name, value in program.state_dict.items():
            value.data.copy_(normal(*value.shape, seed=len(name)))
    result = to_ane(programs[1])
    assert list(result.graph_signature.buffers_to_mutate.values()) == ["state", "weight"]
    assert [reason.what.partition(":")[0] for reason in left(result)] == ["linear stays as it is"], "its weight changes from call to call"
    first, second = programs[0].module(), result.module()
    for seed in range(3):
        x = normal(2, 8, seed=seed)
        torch.testing.assert_close(second(x), first(x), rtol=1e-12, atol=1e-12)
        for name in ("state", "weight"):
            torch.testing.assert_close(second.get_buffer(name), first.get_buffer(name), rtol=1e-12, atol=1e-12)


def _outputs(m, x, y):
    hidden = F.linear(x, m.weight)
    turned = hidden.transpose(1, 2)
    return x, hidden, turned, turned, hidden.flatten(), m.weight, y, None, turned.transpose(1, 2), F.linear(hidden, m.weight)


def test_inputs_weights_and_views_as_outputs(function, exported, same) -> None:
    program = exported(function(_outputs, weight=normal(8, 8)), normal(2, 6, 8), torch.arange(3))
    result = to_ane(program)
    assert len(result.graph_signature.output_specs) == len(program.graph_signature.output_specs)
    same(result, program, normal(2, 6, 8, seed=1), torch.arange(3) + 1)


def test_a_program_without_calls(function, exported, same) -> None:
    program = exported(function(lambda m, x: (x, m.weight), weight=normal(3)), normal(2))
    same(split_einsum(to_ane(program)), program, normal(2))


def test_an_input_that_is_changed(function, exported, same) -> None:
    program = exported(function(lambda m, x: F.linear(x.mul_(2), m.weight), weight=normal(5, 8)), normal(2, 6, 8))
    result = to_ane(program)
    x, y = normal(2, 6, 8), normal(2, 6, 8)
    torch.testing.assert_close(result.module()(x), program.module()(y), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x, normal(2, 6, 8) * 2)
    torch.testing.assert_close(y, x)


def test_the_program_given_is_not_changed(function, exported) -> None:
    module = function(lambda m, x, y: F.linear(F.rms_norm(x, (8,), m.norm) + F.embedding(y, m.table), m.weight).cumsum(1), **{
        "norm": normal(8), "table": normal(10, 8), "weight": normal(5, 8)
    })  # fmt: skip
    program = exported(module, normal(2, 6, 8), torch.zeros(2, 6, dtype=torch.long))
    before, shapes = text(program), {name: value.shape for name, value in program.state_dict.items()}
    result = to_ane(program)
    assert text(program) == before
    assert {name: value.shape for name, value in program.state_dict.items()} == shapes
    assert not program.constants
    assert result.state_dict["norm"].data_ptr() == program.state_dict["norm"].data_ptr(), "a weight is not copied"
    assert all(isinstance(value, nn.Parameter) for value in result.state_dict.values())


def test_new_constants_have_names_of_their_own(exported, same) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("triangle", torch.ones(4, dtype=torch.float64))
            self.rows = nn.Parameter(normal(4, 4))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.cumsum(0) * self.triangle + F.embedding(y, self.rows) + F.embedding(y, self.rows.abs())

    inputs = (normal(4, 4), torch.tensor([3, 1, 0, 2]))
    program = exported(Named(), *inputs)
    result = to_ane(program)
    assert set(result.state_dict) == {"triangle", "rows"}
    assert set(result.constants) == {"triangle_1", "rows_1", "rows_transposed"}
    same(result, program, *inputs)


def test_new_calls_belong_to_the_module_that_they_stand_for(exported) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.RMSNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mlp(self.norm(x))

    result = to_ane(exported(nn.Sequential(Block(), Block()), torch.zeros(2, 6, 8)))
    found = {scope_of(node) for node in result.graph.nodes if operator_of_call(node) == "conv2d"}
    assert found == {f"{block}.mlp.{layer}" for block in (0, 1) for layer in (0, 2)}
    assert {scope_of(node) for node in result.graph.nodes if operator_of_call(node) == "amax"} == {"0.norm", "1.norm"}


def operator_of_call(node: torch.fx.Node) -> str:
    return operator_of(node) if node.op == "call_function" else ""


def test_branches_and_loops_stay_as_they_are(exported, same) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return torch.cond(x.sum() > 0, self.second, lambda v: v * 2, (x,))

    program = exported(Branching().double(), normal(2, 6, 8))
    result = to_ane(program)
    assert "conv2d" in operators(result)
    assert "cond" in operators(result)
    for sign in (1, -1):
        same(result, program, normal(2, 6, 8).abs() * sign)


# Sizes.


def test_sizes_that_vary_are_refused_by_name(exported) -> None:
    batch, length = Dim("batch", min=2, max=8), Dim("length", min=2, max=64)

    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return x.sum() + y.sum() + z.sum()

    shapes = ({0: batch, 1: length}, None, {1: length})
    program = exported(Two(), torch.zeros(4, 5, 8), torch.zeros(3), torch.zeros(2, 5), dynamic_shapes=shapes)
    reasons = unsupported(program)
    assert [reason.where for reason in reasons] == ["x", "z"]
    assert all("takes fixed sizes" in reason.what and "--shapes fixed" in reason.fix for reason in reasons)
    assert ", 8)" in reasons[0].what
    assert not unsupported(exported(Two(), torch.zeros(4, 5, 8), torch.zeros(3), torch.zeros(2, 5)))


def test_a_number_that_varies_is_refused_by_name(exported) -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
            return x * count

    program = exported(Scaled(), torch.zeros(4), 3, dynamic_shapes=(None, Dim.DYNAMIC))
    assert [(reason.where, "number that varies" in reason.what) for reason in unsupported(program)] == [("count", True)]


def test_sizes_that_depend_on_data_are_refused(exported) -> None:
    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0].sum()

    program = exported(nn.Sequential(nn.Identity(), Chosen()), torch.ones(4))
    (reason,) = unsupported(program)
    assert "depends on data" in reason.what
    assert reason.where == "1"
    for lay_out in (to_ane, split_einsum):
        with pytest.raises(UnsupportedError, match="takes fixed sizes") as error:
            lay_out(program)
        assert error.value.reasons == (reason,)


# Values.


def test_values_of_constants(function, exported) -> None:
    def call(m, x):
        places = torch.arange(3) + m.places
        for _ in range(40):  # each is read twice: 2^40 ways lead to the first
            places = places + places
        return x + places, x + torch.rand(3), x + torch.empty(3).fill_(0), x + m.large

    program = exported(function(call, places=torch.tensor([1, 2, 3]), large=torch.ones(1 << 17, 1)), normal(1, 3))
    editor = Editor(program)
    sums = [node for node in editor.calls(torch.ops.aten.add.Tensor) if node.args[0].op == "placeholder"]
    found = [editor.value(node.args[1]) for node in sums if node.args[1].name != "b_places"]
    torch.testing.assert_close(found[0], torch.tensor([1, 3, 5]) * 2**40)
    assert found[1] is None, "random numbers"
    assert found[-1] is None, "too large"
    assert editor.value(sums[-1].args[1], 1 << 20) is not None
    assert editor.value(sums[0]) is None, "an input"


# The movements between.

W = {
    "weight": normal(8, 8),
    "wide": normal(16, 8, seed=4),
    "row": normal(8, seed=1),
    "table": normal(6, 8, seed=2),
    "number": normal(1, seed=3)[0],
}

CHAINS = {
    "one after the other": lambda m, x: F.linear(F.linear(x, m.weight).relu(), m.weight),
    "residual": lambda m, x: x + F.linear(F.gelu(F.linear(x, m.weight)), m.weight),
    "with rows and tables": lambda m, x: F.linear(F.linear(x, m.weight) * m.row + m.table, m.weight),
    "with a number": lambda m, x: F.linear(F.linear(x, m.weight) * m.number - 1.5, m.weight),
    "chunks": lambda m, x: sum(F.linear(c, m.weight) for c in F.linear(x, m.wide).chunk(2, -1)),
    "chunks of the layout": lambda m, x: torch.stack([F.linear(c, m.weight[:, :4]) for c in F.linear(x, m.weight).chunk(2, -1)]),
    "uneven parts": lambda m, x: [c * 2 for c in F.linear(x, m.weight).split([1, 5, 2], -1)],
    "parts of the positions": lambda m, x: F.linear(torch.cat([c.relu() for c in F.linear(x, m.weight).split(4, 1)], 1), m.weight),
    "slices": lambda m, x: F.linear(x, m.weight)[:, 1:4, 2:-1] + F.linear(x, m.weight)[:, ::2, :5],
    "a slice of every second": lambda m, x: F.linear(x, m.weight)[:, ::2, 1::3],
    "an empty slice": lambda m, x: F.linear(x, m.weight)[:, 3:3].sum() + F.linear(x, m.weight).sum(),
    "selected": lambda m, x: F.linear(x, m.weight)[:, -1] + F.linear(x, m.weight).select(1, 2) + F.linear(x, m.weight)[..., 0, None][:, 0],
    "unbound": lambda m, x: [a.relu() for a in F.linear(x, m.weight).unflatten(-1, (2, 4)).permute(2, 0, 1, 3).unbind(0)],
    "unbound inner parts": lambda m, x: [a.relu() for a in F.linear(x, m.weight).unflatten(-1, (4, 2)).unbind(-1)],
    "reductions": lambda m, x: [
        F.linear(x, m.weight).mean(-1), F.linear(x, m.weight).sum(1, keepdim=True), F.linear(x, m.weight).amax((0, 2)),
        F.linear(x, m.weight).mean((1, 2), keepdim=True), F.linear(x, m.weight).prod(-1), F.linear(x, m.weight).sum(),
        F.linear(x, m.weight).amin((1, -1)), F.linear(x, m.weight).unflatten(-1, (2, 4)).mean((1, 3)), (F.linear(x, m.weight) > 0).sum(-1),
    ],
    "softmax": lambda m, x: [F.linear(x, m.weight).softmax(-1), F.linear(x, m.weight).log_softmax(1), F.linear(x, m.weight).softmax(dim=0)],
    "softmax of a part of an axis": lambda m, x: F.linear(x, m.weight).unflatten(-1, (2, 4)).softmax(-1).flatten(2),
    "joined": lambda m, x: F.linear(torch.cat([F.linear(x, m.weight)[..., :4], F.linear(x, m.weight)[..., 4:]], -1), m.weight),
    "joined with an input": lambda m, x: torch.cat([F.linear(x, m.weight), x], -1).relu(),
    "joined along positions": lambda m, x: torch.cat([F.linear(x, m.weight), x[:, :1], m.table[None].expand(2, 6, 8)], 1).relu(),
    "joined with nothing": lambda m, x: torch.cat([F.linear(x, m.weight), x.new_zeros(0)], 1).relu(),
    "compared": lambda m, x: torch.where(F.linear(x, m.weight) > m.row, F.linear(x, m.weight), x).clamp(-1, 1),
    "picture and back": lambda m, x: F.linear(
        F.conv2d(F.linear(x, m.weight).mT.unflatten(2, (2, 3)), m.weight[..., None, None]).flatten(2).mT, m.weight
    ),
    "pixels": lambda m, x: F.linear(x, m.weight).reshape(2, 2, 3, 2, 2, 2).permute(0, 5, 1, 3, 2, 4).reshape(2, 2, 4, 6).sin(),
    "no common factors": lambda m, x: F.linear(x, m.weight).mT.reshape(2, 6, 8).mT.reshape(2, 3, 16).relu(),
    "other dtypes": lambda m, x: (
        F.linear(x, m.weight).float().relu().to(torch.float64, memory_format=torch.contiguous_format) * m.number.float()
    ),
    "bits": lambda m, x: F.linear(x, m.weight).view(torch.int64).view(torch.float64) + F.linear(x, m.weight).float().view(2, 6, 8),
    "a number of a wider dtype": lambda m, x: F.linear(x, m.weight).float() * m.number + F.linear(x, m.weight).half() * m.number,
    "expanded": lambda m, x: F.linear(x[:, :1], m.weight).expand(2, 6, 8) * F.linear(x, m.weight),
    "batch and positions as one": lambda m, x: F.linear(F.linear(x, m.weight).flatten(0, 1), m.weight).unflatten(0, (2, 6)),
    "rank 2 broadcast": lambda m, x: (
        F.linear(x, m.weight) * (1 + F.linear(x[:, 0], m.weight).unsqueeze(1)) + F.linear(x[:, 1], m.weight)[:, None]
    ),
    "positions broadcast": lambda m, x: F.linear(x, m.weight) * F.linear(x, m.weight[:1]) + F.linear(x[:1], m.weight),
    "squeezed": lambda m, x: F.linear(x, m.weight[:1]).squeeze(-1) + F.linear(x, m.weight)[:, :, 0],
    "moved": lambda m, x: F.linear(x.movedim(0, 1), m.weight).swapaxes(0, 1) + F.linear(x.mT.contiguous().mT, m.weight),
}  # fmt: skip


def test_movements_between_layers(function, exported, same) -> None:
    def every(m, x):
        results = [call(m, x) for call in CHAINS.values()]
        return [tensor for result in results for tensor in (result if isinstance(result, list | tuple) else [result])]

    module = function(every, **W)
    program = exported(module, normal(2, 6, 8))
    result = to_ane(program)
    again = settle(result)
    same(result, program, normal(2, 6, 8, seed=1))
    same(again, program, normal(2, 6, 8, seed=1))
    assert operators(again).count("permute") <= operators(result).count("permute")


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("one after the other", 2),
        ("with rows and tables", 3),
        ("parts of the positions", 2),
        ("softmax", 4),
        ("rank 2 broadcast", 2),
        ("picture and back", 2),
    ],
)
def test_transposes_that_are_left(name: str, moved: int, function, exported) -> None:
    """One in front and one behind; a table of positions is turned when the program is converted."""
    module = function(CHAINS[name], **W)
    assert operators(to_ane(exported(module, normal(2, 6, 8)))).count("permute") == moved
