"""Tracing: what is captured, what is refused, and how the refusal reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.exporter.errors import UnsupportedError, UsageError
from isthmus.exporter.spec import SizeRange
from isthmus.exporter.trace import dimension_names, trace


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Halve(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        even = x[:, : x.shape[1] // 2 * 2]
        return even.reshape(x.shape[0], -1, 2).sum(-1) * y[:, None]


def test_module_scopes_are_kept() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    program = trace(module, {"input": torch.randn(2, 4)})
    scopes = [list(n.meta["nn_module_stack"].values())[-1][0] for n in program.graph.nodes if n.op == "call_function"]
    assert scopes == ["0", "1"]


def test_dynamic_sizes_get_their_names_and_hold_at_another_size() -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(4, 8), "y": torch.randn(4)}
    dynamic = {"x": {0: "batch", 1: "width"}, "y": {0: "batch"}}
    program = trace(Halve(), inputs, dynamic=dynamic, ranges={"batch": SizeRange(1, 4, 8), "width": SizeRange(2, 8, 64)})
    assert set(dimension_names(program, dynamic, inputs).values()) == {"batch", "width"}
    x, y = torch.randn(6, 12), torch.randn(6)
    torch.testing.assert_close(program.module()(x, y), Halve()(x, y))


class Variadic(nn.Module):
    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return x + sum(rest)


@pytest.mark.parametrize("dynamic", [{}, {"x": {0: "batch"}, "rest_0": {0: "batch"}, "rest_1": {0: "batch"}}])
def test_a_forward_of_any_number_of_inputs(dynamic: dict[str, dict[int, str]]) -> None:
    inputs = {"x": torch.randn(4, 3), "rest_0": torch.randn(4, 3), "rest_1": torch.randn(4, 3)}
    program = trace(Variadic(), inputs, dynamic=dynamic, ranges={"batch": SizeRange(1, 4, 8)})
    another = [torch.randn(5 if dynamic else 4, 3) for _ in inputs]
    torch.testing.assert_close(program.module()(*another), Variadic()(*another))


def test_a_data_dependent_branch_is_refused_with_the_users_line() -> None:
    with pytest.raises(UnsupportedError) as caught:
        trace(Branch(), {"x": torch.randn(3)})
    assert caught.value.exit_code == 4
    assert any("test_trace.py" in reason.where and "x.sum() > 0" in reason.where for reason in caught.value.reasons)
    assert "torch.where" in caught.value.hint


def test_every_bad_axis_is_reported_at_once() -> None:
    inputs = {"x": torch.randn(1, 8), "y": torch.randn(4)}
    with pytest.raises(UsageError) as caught:
        trace(
            Halve(),
            inputs,
            dynamic={"x": {0: "batch", 5: "batch"}, "y": {0: "width"}, "z": {0: "batch"}},
            ranges={"batch": SizeRange(1, 4, 8), "width": SizeRange(8, 8, 64)},
        )
    text = str(caught.value)
    assert "example size 1" in text
    assert "axis 5 does not exist" in text
    assert "outside its range 8 to 64" in text
    assert "no such input" in text
