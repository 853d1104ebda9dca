"""Which calls stay in float32 for a decision's sake."""

from __future__ import annotations

import pytest
import torch

from isthmus.exporter.decisions import exact_calls
from isthmus.exporter.trace import trace

W = torch.arange(16.0).reshape(4, 4)


def exact(function, **inputs):
    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(W)

        def forward(self, x):
            return function(x, self.w)

    program = trace(One().eval(), inputs)
    graph = program.graph
    chosen = exact_calls(graph)
    return [str(n.target.__name__).partition(".")[0] for n in graph.nodes if n in chosen]


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (lambda x, _: torch.round(torch.exp(x) * 2), torch.ones(4), ["mul", "round"]),
        (lambda x, _: torch.exp(x) > 2 * x, torch.ones(4), ["mul", "gt"]),
        (lambda x, w: (-(torch.exp(x @ w) @ w)).argmin(-1), torch.ones(2, 4), ["matmul", "neg", "argmin"]),
        (lambda x, w: torch.topk(-(torch.exp(x) @ w), 2)[1], torch.ones(2, 4), ["matmul", "neg", "topk"]),
        (lambda x, w: (x + x) @ w, torch.ones(2, 4), []),
        (lambda x, _: x.float() * 0.3, torch.arange(4), ["to", "mul"]),
        (lambda x, w: x.float() @ w, torch.arange(4), ["to"]),
    ],
)
def test_exact_calls(function, x, expected):
    assert exact(function, x=x) == expected
