"""Takes a traced program to the operators that coreai-torch converts rightly."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

import torch
from torch.export import ExportedProgram

from ...exporter.ops.coreai_table import decompositions
from ...exporter.quiet import quiet
from .lowerings import table

_prepared: weakref.WeakKeyDictionary[ExportedProgram, ExportedProgram] = weakref.WeakKeyDictionary()


def prepare(program: ExportedProgram, *, again: bool = False) -> ExportedProgram:
    """A copy of a program in ATen operators, loops, and operators of ours, which stay whole.

    Args:
        program: As torch.export gave it.
        again: The result is only looked at, and the next call for this program gives it too: what is asked of a program before it is
            lowered takes as long as the lowering's own part.

    Returns:
        A new program; weights are shared with the given one.
    """
    found = _prepared.pop(program, None)
    result = _decomposed(program, table()) if found is None else found
    if again:
        _prepared[program] = result
    return result


def expand(program: ExportedProgram) -> ExportedProgram:
    """The same with our operators written as loops over chunks; see `exporter.ops.coreai_table`."""
    ours = decompositions()
    if not any(node.target in ours for node in program.graph.nodes):
        return program
    again = {
        operator: function for operator, function in table().items() if operator != torch.ops.aten.scaled_dot_product_attention.default
    }
    return _decomposed(program, {**again, **ours})  # attention has been guarded, and would be once more


def _decomposed(program: ExportedProgram, decompositions: dict[Any, Any]) -> ExportedProgram:
    with warnings.catch_warnings(), quiet("torch.export", "torch.fx"):
        # Copying a program with a loop touches a class of torch.utils._pytree that torch 2.13 itself deprecates.
        warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
        result: ExportedProgram = program.run_decompositions(copy.copy(decompositions))
    return result
