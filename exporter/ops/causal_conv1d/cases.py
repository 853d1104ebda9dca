"""The inputs that every implementation of the causal convolution must pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...op import Arrays, Case


def _case(
    name: str,
    length: int,
    batch: int = 1,
    channels: int = 5,
    width: int = 4,
    *,
    optional: str = "",
    silu: bool = False,
    large: bool = False,
) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        x = rng.standard_normal((batch, channels, length))
        x[:, :, 2::5] = 0.0
        shapes = {"bias": (channels,), "initial_state": (batch, channels, width - 1)}
        arrays: dict[str, Any] = {"x": x * (3000.0 if large else 1.0), "weight": rng.standard_normal((channels, 1, width))}
        return arrays | {n: rng.standard_normal(shapes[n]) for n in optional.split()}

    return Case(name, make, {"silu": silu})


def cases() -> tuple[Case, ...]:
    """The table."""
    both = "bias initial_state"
    return (
        _case("one token", 1, 3, optional=both, silu=True),
        _case("shorter than the carry", 2, 3, optional="initial_state"),
        _case("plain", 7, 3, 19),
        _case("bias", 64, 1, 33, optional="bias"),
        _case("everything", 64, 3, 19, optional=both, silu=True),
        _case("narrow", 255, 1, 16, 2, optional=both, silu=True),
        _case("wide", 255, 3, 5, 7, optional=both),
        _case("large inputs", 64, 1, 17, optional="bias", silu=True, large=True),
        _case("long", 4096, 1, 5, optional=both, silu=True),
    )
