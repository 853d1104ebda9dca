"""How far a program is from its PyTorch module, module by module: the error that a module inherits apart from the error that it injects.

The PyTorch module is run once more, on the program's values: before every call inside it, the call's arguments are replaced by the values
that the program has in their place, and after it, its results. So each module computes with what the program gave it, and what differs
then is its own. Where r is a module's result in PyTorch, a the program's, and f what PyTorch makes of the program's own values::

    total     = a - r        what is wrong with it, in all
    inherited = f - r        what was wrong before it, or in the modules inside it
    injected  = a - f        what went wrong in it

The code of a module that holds others (a residual, a modulation) is checked between them: where an argument that this code computed from
the program's values is not the value that the program has in its place, the error is the outer module's.

Memory is bounded: values are read in groups (see `Pages`), each with another run of the program or of the module.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..exporter.flow import Values
from ..exporter.spec import Arrays
from .correspondence import Correspondence, Place, Spot
from .forced import Forced
from .modules import Call, aliases, by_end, read_outputs, record, unseen, walk
from .pages import Pages
from .row import Figures, Row, measured
from .verify import to_tensors

Array = np.ndarray[Any, Any]

MEMORY = 2**30
"""Bytes of values that are held at a time, by default."""


@dataclass(frozen=True)
class Reference:
    """What a program is compared with.

    Attributes:
        module: The PyTorch module, in eval mode.
        example: Example inputs, for the inputs' types and order.
    """

    module: nn.Module
    example: Mapping[str, torch.Tensor]

    def tensors(self, inputs: Arrays) -> tuple[torch.Tensor, ...]:
        """The module's arguments: copies, in the types of the example."""
        return to_tensors({name: inputs[name] for name in self.example}, self.example)


def diff(
    reference: Reference,
    values: Values,
    inputs: Arrays,
    *,
    threshold: float,
    memory: int = MEMORY,
    case: str = "",
) -> list[Row]:
    """Compares a program with its PyTorch module on one set of inputs.

    Args:
        reference: The module.
        values: The program.
        inputs: The inputs by name.
        threshold: The relative error from which on a module is over it; decides which doubtful correspondences are checked.
        memory: Bytes of values that may be held at a time, beside the weights and what the module itself needs. A value that is larger by
            itself is held all the same.
        case: The name of these inputs, for the rows.

    Returns:
        A row for every call of a module, in the order in which their errors were found; those that are not visible among them.

    Raises:
        IsthmusError: The module or the program fails.
    """
    calls = record(reference.module, reference.tensors(inputs))
    side = _Side(calls, values, inputs, aliases(reference.module))
    wanted = [(call, j) for call in by_end(calls) for j, spot in enumerate(side.places[call.key].outputs) if spot is not None]
    theirs = Pages(
        lambda keys: read_outputs(reference.module, reference.tensors(inputs), keys),
        [(call.key, j) for call, j in wanted],
        {(call.key, j): call.outputs[j].nbytes for call, j in wanted},
        memory // 2,
    )
    ours = side.pages(list(_needs(calls, side.places)), memory // 2)
    forced = Forced(calls, side.places, ours, theirs, side.read, threshold)
    walk(reference.module, reference.tensors(inputs), forced)
    return sorted((dataclasses.replace(row, case=case) for row in forced.rows.values()), key=lambda row: row.order)


def apart(reference: Reference, a: Values, b: Values, cases: Mapping[str, Arrays], *, memory: int = MEMORY) -> dict[str, Figures]:
    """How far the modules' results are apart in two programs.

    Args:
        reference: The module that both are of.
        a: One program.
        b: The other.
        cases: The inputs of each case.
        memory: See `diff`.

    Returns:
        For every call whose result is visible in both, by its key, b against a: the worst of the cases and results.

    Raises:
        IsthmusError: The module or a program fails.
    """
    found: dict[str, Figures] = {}
    for inputs in cases.values():
        calls = record(reference.module, reference.tensors(inputs))
        sides = [_Side(calls, values, inputs, aliases(reference.module)) for values in (a, b)]
        both = [(c, j) for c in by_end(calls) for j in range(len(c.outputs)) if all(s.places[c.key].outputs[j] is not None for s in sides)]
        pages = [side.pages([side.name(call, j) for call, j in both], memory // 2) for side in sides]
        for call, j in both:
            arrays = [
                side.places[call.key].outputs[j].arranged(page.take(side.name(call, j)), call.outputs[j].shape)  # type: ignore[union-attr]  # seen above
                for side, page in zip(sides, pages, strict=True)
            ]
            figures = measured(*arrays)
            if call.key not in found or figures.relative_l2 > found[call.key].relative_l2:
                found[call.key] = figures
    return found


class _Side:
    """A program, with the places of the reference's calls in it on some inputs."""

    def __init__(self, calls: Sequence[Call], values: Values, inputs: Arrays, others: Mapping[str, str]) -> None:
        correspondence = Correspondence(calls, values.flow, others)
        self._values, self._inputs = values, inputs
        self.shapes = values.shapes(inputs, correspondence.names)
        self.places = correspondence.places(self.shapes)
        if values.opaque:
            root = calls[0].key
            self.places = {k: p if k == root else dataclasses.replace(p, reason=values.opaque) for k, p in self.places.items()}

    def name(self, call: Call, j: int) -> str:
        """The value of a call's result, which is visible."""
        spot = self.places[call.key].outputs[j]
        assert spot is not None
        return spot.name

    def read(self, names: Sequence[str]) -> Mapping[str, Array]:
        """Some values."""
        with unseen():  # what executes the program may be the module itself
            return self._values.read(self._inputs, names)

    def pages(self, order: Sequence[str], budget: int) -> Pages[str]:
        """Its values in the order in which they are needed."""
        # 4 bytes an element: a program has no wider activations than PyTorch's float32 (int64 apart, which is no large one).
        return Pages(self.read, order, {name: 4 * math.prod(self.shapes[name]) for name in order}, budget)


def _needs(calls: Sequence[Call], places: Mapping[str, Place]) -> Iterator[str]:
    """The names of the values in the order in which they are needed."""
    inner: dict[str | None, list[Call]] = {}
    for call in calls:
        inner.setdefault(call.parent, []).append(call)

    def names(spots: Sequence[Spot | None]) -> Iterator[str]:
        yield from (spot.name for spot in spots if spot is not None)

    def visit(call: Call) -> Iterator[str]:
        if call.parent is not None:
            yield from names(places[call.key].inputs)
        for child in inner.get(call.key, ()):
            yield from visit(child)
        yield from names(places[call.key].outputs)

    yield from visit(calls[0])
