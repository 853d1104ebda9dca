"""The inputs that every implementation of normalised linear attention must pass."""

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
    value: int = 16,
    *,
    tokens: int | None = None,
    eps: float = 1e-15,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        widths = {"q": (length, key), "k": (tokens or length, key), "v": (tokens or length, value)}
        arrays: dict[str, Any] = {n: rng.standard_normal((batch, t, heads * width)) for n, (t, width) in widths.items()}
        if change is not None:
            change(arrays)
        return arrays

    return Case(name, make, {"num_heads": heads, "eps": eps})


def _zero_rows(arrays: dict[str, Any]) -> None:
    # Features of such a row are all zero: without the epsilon the row is 0 / 0.
    arrays["q"][:, ::3] = -np.abs(arrays["q"][:, ::3])
    arrays["q"][:, 1::5] = 0.0
    arrays["k"][:, ::2] = 0.0


def _large(arrays: dict[str, Any]) -> None:
    # The sums leave float16's range, their quotient does not.
    arrays["q"] *= 30.0
    arrays["k"] *= 30.0
    arrays["v"] *= 30.0


def cases() -> tuple[Case, ...]:
    """The table."""
    return (
        _case("one token", 1, 3),
        _case("short, odd sizes", 7, 3, 3, 5, 7),
        _case("square", 64, 3),
        _case("the size of SANA's heads", 255, 1, 2, 32, 32),
        _case("more keys than queries", 64, 1, tokens=255),
        _case("rows of zero", 64, 3, change=_zero_rows),
        _case("a large epsilon", 64, eps=1e-2),
        _case("large inputs", 255, change=_large),
        _case("long", 4096, 1, 1, 64, 16),
    )
