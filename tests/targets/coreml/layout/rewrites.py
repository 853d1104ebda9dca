"""What the tests of the rewrites share: random tensors, the operators of a program, and what is compared of it."""

from __future__ import annotations

import torch

from isthmus.targets.coreml.layout import left
from isthmus.targets.coreml.layout.graph import operator_of


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {operator_of(node) for node in program.graph.nodes if node.op == "call_function"}


def every(calls):
    """A function whose results are those of all the calls."""
    return lambda *given: tuple(call(*given) for call in calls)


def assert_left(program: torch.export.ExportedProgram, whys: list[str], **options: bool) -> None:
    reasons = left(program, **options)
    assert len(reasons) == len(whys)
    for reason, why in zip(reasons, whys, strict=True):
        assert why in reason.what
