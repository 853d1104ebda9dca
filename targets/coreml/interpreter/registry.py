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


def tensor(values: Array) -> Any:
    """The array as a `torch.Tensor`, without a copy where torch takes it as it is."""
    import torch

    values = np.ascontiguousarray(values)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


# numpy converts float16 number by number; torch does it some twenty times faster, which pays from this many elements on.
_MANY = 4096


def widened(value: Any) -> Any:
    """float16 as float32; tuples element by element; everything else as it is."""
    if isinstance(value, tuple):
        return tuple(widened(v) for v in value)
    if not isinstance(value, np.ndarray) or value.dtype != np.float16:
        return value
    return tensor(value).float().numpy() if value.size >= _MANY else value.astype(np.float32)


def rounded(value: Array, dtype: np.dtype[Any]) -> Array:
    """The values in another dtype; to float16 to the nearest, ties to even, and infinite past its largest number."""
    if value.dtype == np.float32 and dtype == np.float16 and value.size >= _MANY:
        half: Array = tensor(value).half().numpy()
        return half
    return value.astype(dtype, copy=False)


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
