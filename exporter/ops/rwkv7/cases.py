"""The inputs that every implementation of RWKV-7's time mixing must pass.

The removal key has unit length and the learning rate lies in [0, 1], as in the model: otherwise the recurrence itself grows without bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...op import Arrays, Case


def _case(
    name: str,
    length: int,
    batch: int = 1,
    heads: int = 2,
    key: int = 16,
    value: int | None = None,
    *,
    decay: tuple[float, float] = (1e-3, 0.6065),
    state: bool = False,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Case:
    """A case whose -decay spreads log-uniformly over the range given; the model's own lies below exp(-0.5) = 0.6065."""
    low, high = np.log(decay)

    def make(rng: np.random.Generator) -> Arrays:
        shape = (batch, length, heads, key)
        removal = rng.standard_normal(shape)
        removal /= np.linalg.norm(removal, axis=-1, keepdims=True)
        arrays: dict[str, Any] = {
            "r": rng.standard_normal(shape),
            "decay": -np.exp(rng.uniform(low, high, shape)),
            "k": rng.standard_normal(shape) * 0.3,
            "v": rng.standard_normal((batch, length, heads, value or key)),
            "a": -removal,
            "b": removal * rng.uniform(0.0, 1.0, shape),
        }
        arrays = {n: x.reshape(batch, length, -1) for n, x in arrays.items()}
        if state:
            arrays["initial_state"] = rng.standard_normal((batch, heads, key, value or key))
        if change is not None:
            change(arrays)
        return arrays

    return Case(name, make, {"num_heads": heads})


def _zero_rows(arrays: dict[str, Any]) -> None:
    for i, name in enumerate(("r", "k", "v", "a", "b")):
        arrays[name][:, i :: 5 + i] = 0.0


def _no_decay(arrays: dict[str, Any]) -> None:
    arrays["decay"][:, ::3] = 0.0


def _large(arrays: dict[str, Any]) -> None:
    arrays["v"] *= 300.0


def cases() -> tuple[Case, ...]:
    """The table."""
    return (
        _case("one token", 1, 3, state=True),
        _case("short, odd sizes", 7, 3, 3, 5, 7),
        _case("initial state", 64, 3, state=True),
        _case("the size of the model's heads", 255, 1, 2, 64),
        _case("more values than keys", 64, 1, 2, 4, 24, state=True),
        _case("rows of zero", 64, 3, change=_zero_rows),
        _case("large values", 64, change=_large),
        _case("every decay", 1024, 1, 1, decay=(1e-4, 64.0), change=_no_decay),
        _case("long", 4096, 1, 1, 16, 8),
    )
