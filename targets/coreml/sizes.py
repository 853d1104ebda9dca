"""Sizes of the inputs that vary: which of them a package takes, and the program of each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...exporter.errors import Reason
from .convert import user_inputs

if TYPE_CHECKING:
    from torch.export import ExportedProgram

MOST = 128
"""The most shapes that Core ML enumerates for an input (coremltools' guide to flexible inputs)."""

MOST_FUNCTIONS = 9
"""The most functions that are written: each is converted and kept in memory until all are."""

SEVERAL_SINCE = "iOS18"
"""The oldest system that takes enumerated shapes for more than one input (coremltools 9.0, `_validate_enumerated_shape_inputs`)."""

Sizes = Mapping[str, int]
"""A value for each of torch's symbols (`s20`) in the shapes of a program's inputs."""


def unsupported(program: ExportedProgram, how: str, deployment_target: str) -> list[Reason]:
    """Why the sizes of a program cannot vary as asked; empty when they can.

    Args:
        program: From torch.export.
        how: A value of `--shapes`.
        deployment_target: `iOS16`, `iOS17`, …
    """
    if how == "fixed":
        return []
    varying = [name for name, value in user_inputs(program) if not all(isinstance(size, int) for size in value.shape)]
    if not varying:
        return [
            Reason(f"no size of the inputs varies, and --shapes {how} asks for some", fix="name them with --dynamic, or --shapes fixed")
        ]
    reasons = []
    if how != "functions":
        reasons += [
            Reason(
                f"has the size {size}, and Core ML knows sizes alone, not what is computed of them", where=name, fix="--shapes functions"
            )
            for name, value in user_inputs(program)
            for size in value.shape
            if not isinstance(size, int) and not size.node.expr.is_Symbol
        ]
    most = {"enumerated": MOST, "functions": MOST_FUNCTIONS}.get(how)
    if most is not None and (count := len(chosen(program))) > most:
        what = f"the smallest, the example's and the largest of each size make {count} combinations, and --shapes {how} takes {most}"
        reasons.append(Reason(what, where=", ".join(varying), fix="fix some of the sizes (--batch-size, --dynamic), or --shapes range"))
    since = int(SEVERAL_SINCE.removeprefix("iOS"))
    if how == "enumerated" and len(varying) > 1 and int(deployment_target.removeprefix("iOS")) < since:
        what = f"{len(varying)} inputs have sizes that vary, and lists of shapes for more than one are read since {SEVERAL_SINCE}"
        reasons.append(
            Reason(f"{what}, got {deployment_target}", where=", ".join(varying), fix=f"--minimum-deployment-target {SEVERAL_SINCE}")
        )
    return reasons


def chosen(program: ExportedProgram) -> list[Sizes]:
    """The sizes of a list: the example's first, then the smallest, the example's and the largest value of each with those of the others."""
    example = _example(program)
    values = [tuple(dict.fromkeys((size, *_range(program, symbol, size)))) for symbol, size in example.items()]
    return [dict(zip(example, row, strict=True)) for row in itertools.product(*values)]


def shapes(program: ExportedProgram, sizes: Sequence[Sizes]) -> list[list[tuple[int, ...]]]:
    """The shapes of each input at each of the sizes."""
    return [[_shape(value, at) for at in sizes] for _, value in user_inputs(program)]


def fixed(program: ExportedProgram, sizes: Sizes) -> ExportedProgram:
    """The program at one of its sizes, traced anew. It shares its tensors with the one given, as torch.export gave that.

    Raises:
        UnsupportedError: The program does not compute at these sizes.
    """
    import torch

    from ...exporter.trace import trace

    inputs = {name: torch.zeros(_shape(value, sizes), dtype=value.dtype) for name, value in user_inputs(program)}
    return trace(program.module(), inputs)


def _example(program: ExportedProgram) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, value in user_inputs(program):
        for size in value.shape:
            if not isinstance(size, int):
                hints = size.node.shape_env.backed_var_to_val
                found.update({str(symbol): int(hints[symbol]) for symbol in sorted(size.node.expr.free_symbols, key=str)})
    return found


def _range(program: ExportedProgram, symbol: str, example: int) -> tuple[int, int]:
    for found, ends in program.range_constraints.items():
        if str(found) == symbol:
            return max(1, int(ends.lower)), int(ends.upper)
    return example, example


def _shape(value: Any, sizes: Sizes) -> tuple[int, ...]:
    return tuple(
        size if isinstance(size, int) else int(size.node.expr.subs({symbol: sizes[str(symbol)] for symbol in size.node.expr.free_symbols}))
        for size in value.shape
    )
