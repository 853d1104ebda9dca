"""Where the operations are registered, and the values that they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

Operation = Callable[..., Any]
"""Computes the outputs of one operation: an array, or a tuple of arrays.

It is called with the operation's inputs by their MIL names: arrays (float16 ones widened to float32), strings, or tuples of arrays. Inputs
that the program leaves out and that have no default in MIL are not passed.
"""

OPERATIONS: dict[str, Operation] = {}
"""Every operation by its MIL type."""


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Registers the function under MIL operation types."""

    def decorate(function: Operation) -> Operation:
        for name in names:
            OPERATIONS[name] = function
        return function

    return decorate


def integers(values: Any) -> list[int]:
    """The values of a shape, permutation, or list of axes, as Python's integers."""
    return [int(v) for v in np.asarray(values).reshape(-1)]


def axes_of(axes: Any, rank: int) -> tuple[int, ...]:
    """Axes counted from the front; None stands for all of them."""
    return tuple(range(rank)) if axes is None else tuple(a % rank for a in integers(axes))


def along(values: Array, axis: int, rank: int) -> Array:
    """A vector shaped so that it is broadcast along one axis of a tensor of that rank."""
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def flags(values: Any, count: int) -> Sequence[bool]:
    """Booleans of a mask; None stands for none set."""
    return [False] * count if values is None else [bool(v) for v in np.asarray(values).reshape(-1)]
