"""The inputs that every implementation of the selective scan must pass.

Every value of the issue's lists appears in at least one case, together with others that are hard for other reasons. The skip D u hides
errors of the scan, so most cases have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...op import Arrays, Case

Rng = np.random.Generator


def _inputs(
    length: int,
    batch: int = 1,
    channels: int = 5,
    state: int = 4,
    groups: int = 1,
    *,
    delta: tuple[float, float] = (1e-3, 1e-1),
    A: tuple[float, float] = (1.0, 16.0),
    optional: str = "",
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Callable[[Rng], Arrays]:
    """Inputs whose delta and -A spread log-uniformly over the ranges given; `optional` names the optional ones to give."""

    def spread(rng: Rng, low: float, high: float, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return np.exp(rng.uniform(np.log(low), np.log(high), shape))

    def make(rng: Rng) -> Arrays:
        tokens = (batch, length)
        arrays: dict[str, Any] = {
            "u": rng.standard_normal((*tokens, channels)),
            "delta": spread(rng, *delta, (*tokens, channels)),
            "A": -spread(rng, *A, (channels, state)),
            "B": rng.standard_normal((*tokens, groups * state)),
            "C": rng.standard_normal((*tokens, groups * state)),
        }
        shapes = {
            "D": (channels,),
            "z": (*tokens, channels),
            "delta_bias": (channels,),
            "initial_state": (batch, channels, state),
        }
        arrays |= {name: rng.standard_normal(shapes[name]) for name in optional.split()}
        if change is not None:
            change(arrays)
        return arrays

    return make


def _zero_steps(arrays: dict[str, Any]) -> None:
    arrays["delta"][:, ::3] = 0.0


def _zero_rows(arrays: dict[str, Any]) -> None:
    arrays["u"][:, 2::5] = 0.0
    arrays["B"][:, 1::4] = 0.0
    arrays["C"][:, 3::7] = 0.0


def _large(arrays: dict[str, Any]) -> None:
    # Within float16: |y| stays below 65504 for these ranges of delta and A.
    arrays["u"] *= 300.0


def _signed(arrays: dict[str, Any]) -> None:
    # What softplus is for: its input is any number, and beyond 20 it is the identity.
    rng = np.random.Generator(np.random.PCG64(7))
    arrays["delta"] = rng.uniform(-9.0, 3.0, arrays["delta"].shape)
    arrays["delta"][:, ::11] = 25.0


def cases() -> tuple[Case, ...]:
    """The table."""
    everything = "D z delta_bias initial_state"
    return (
        Case("one token", _inputs(1)),
        Case("one token, everything", _inputs(1, 3, 33, 16, optional=everything), {"delta_softplus": True}),
        Case("short, odd channels", _inputs(7, 3, 19, 16)),
        Case("everything", _inputs(64, 3, 6, 4, 2, optional=everything, change=_signed), {"delta_softplus": True}),
        Case(
            "everything, reversed", _inputs(64, 3, 6, 4, 2, optional=everything, change=_signed), {"delta_softplus": True, "reverse": True}
        ),
        Case("reversed, odd length", _inputs(255, 1, 7, 16), {"reverse": True}),
        Case("large state", _inputs(64, 1, 9, 64)),
        Case("groups", _inputs(64, 1, 12, 16, 3)),
        Case("initial state", _inputs(64, 3, 5, 4, optional="initial_state")),
        Case("long decay", _inputs(1024, 1, 5, 16, delta=(1e-4, 1e-3), A=(1e-3, 1e-2))),
        Case("steep decay", _inputs(255, 3, 5, 4, delta=(1.0, 8.0), A=(1.0, 64.0))),
        Case("every decay", _inputs(1024, 1, 5, 4, delta=(1e-4, 8.0), A=(1e-3, 64.0))),
        Case("steps of zero", _inputs(255, 1, 5, 4, optional="initial_state", change=_zero_steps)),
        Case("rows of zero", _inputs(64, 1, 5, 16, change=_zero_rows)),
        Case("large inputs", _inputs(64, 1, 5, 16, optional="D", change=_large)),
        Case("long", _inputs(4096, 1, 5, 4, delta=(1e-4, 8.0), A=(1e-3, 64.0))),
    )
