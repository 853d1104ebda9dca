"""ATen operators that coreai-torch 0.4.3 lacks or lowers wrongly, in terms of those that it lowers rightly.

coreai-torch drops keywords without a word (`alpha`, `count_include_pad`), computes some functions with few digits (`log1p` of small
numbers) and fails in others at run time only. Each function here replaces the calls that it names; it gives `NotImplemented` for those
that are right as they are. `table` is for `ExportedProgram.run_decompositions`, which applies it in the branches of `cond` and
`while_loop` as well, where coreai-torch's own hook for lowerings is not asked.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

Lowering = Callable[..., Any]
F = TypeVar("F", bound=Lowering)

_MODULES = ("activations", "arithmetic", "attention", "comparisons", "indexing", "pooling", "reductions", "resizing", "shapes")

LOWERINGS: dict[Any, Lowering] = {}
"""Ours, by the overload that they replace."""


def lowering(*operators: Any) -> Callable[[F], F]:
    """Registers a function for overloads of `torch.ops`; its arguments are those of the call."""

    def decorate(function: F) -> F:
        for operator in operators:
            assert operator not in LOWERINGS, f"{operator} is lowered twice"
            LOWERINGS[operator] = function
        return function

    return decorate


@functools.cache
def table() -> dict[Any, Lowering]:
    """The decompositions that a program needs: coreai-torch's table, torch's own for what the converter lacks, and ours over them."""
    from torch._decomp import global_decomposition_table

    from ....exporter.ops.coreai_table import coreai_torch

    for module in _MODULES:
        importlib.import_module(f"{__name__}.{module}")
    known = converted()
    # `dict` would drop what torch's table finds only when asked.
    found = coreai_torch().get_decomp_table()
    for operator, decomposition in global_decomposition_table["post_autograd"].items():
        if operator not in found and name_of(operator) not in known and not str(operator).endswith("out"):
            found[operator] = decomposition
    found.update(LOWERINGS)
    return found  # type: ignore[no-any-return]  # untyped


@functools.cache
def converted() -> frozenset[str]:
    """The ATen operators that coreai-torch converts, as it names them: `add.Tensor`. There is no public list."""
    from ....exporter.ops.coreai_table import coreai_torch

    coreai_torch()  # first, for its warning
    from coreai_torch import _aten_to_core

    return frozenset(_aten_to_core._aten_to_core_resolver)


def name_of(operator: Any) -> str:
    """`add.Tensor` for the overload, or the builtin's name."""
    return str(operator).removeprefix("aten.") if hasattr(operator, "_schema") else getattr(operator, "__name__", str(operator))
