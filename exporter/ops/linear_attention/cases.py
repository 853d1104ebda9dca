"""The inputs that every implementation of linear attention must pass.

Keys of the delta rules have unit length, as the standard asks: with longer ones the recurrence itself grows without bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...op import Arrays, Case

Rng = np.random.Generator


def _case(
    name: str,
    rule: str,
    length: int,
    batch: int = 1,
    heads: tuple[int, int] = (2, 2),
    key: int = 16,
    value: int = 16,
    *,
    decay: tuple[float, float] = (1e-3, 1.0),
    per_key: bool = False,
    state: bool = False,
    shared_beta: bool = False,
    scale: float = 0.0,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Case:
    """A case whose -decay spreads log-uniformly over the range given."""
    q_heads, kv_heads = heads

    def make(rng: Rng) -> Arrays:
        tokens = (batch, length)
        k = rng.standard_normal((*tokens, kv_heads, key))
        if "delta" in rule:
            k /= np.linalg.norm(k, axis=-1, keepdims=True)
        else:
            k /= key**0.5
        arrays: dict[str, Any] = {
            "q": rng.standard_normal((*tokens, q_heads * key)),
            "k": k.reshape(*tokens, -1),
            "v": rng.standard_normal((*tokens, kv_heads * value)),
        }
        if "gated" in rule:
            low, high = np.log(decay)
            arrays["decay"] = -np.exp(rng.uniform(low, high, (*tokens, kv_heads * (key if per_key else 1))))
        if "delta" in rule:
            arrays["beta"] = rng.uniform(0.0, 1.0, (*tokens, 1 if shared_beta else kv_heads))
        if state:
            arrays["initial_state"] = rng.standard_normal((batch, kv_heads, key, value))
        if change is not None:
            change(arrays)
        return arrays

    return Case(name, make, {"q_num_heads": q_heads, "kv_num_heads": kv_heads, "update_rule": rule, "scale": scale})


def _zero_rows(arrays: dict[str, Any]) -> None:
    for i, name in enumerate(("q", "k", "v")):
        arrays[name][:, i :: 4 + i] = 0.0


def _no_decay(arrays: dict[str, Any]) -> None:
    arrays["decay"][:, ::3] = 0.0


def _zero_beta(arrays: dict[str, Any]) -> None:
    arrays["beta"][:, ::3] = 0.0


def _large(arrays: dict[str, Any]) -> None:
    arrays["v"] *= 300.0


def cases() -> tuple[Case, ...]:
    """The table."""
    return (
        _case("linear, one token", "linear", 1, 3, state=True),
        _case("linear", "linear", 64, 3, (2, 2), 16, 24, state=True),
        _case("linear, grouped heads", "linear", 255, 1, (6, 2), 4, 5, scale=1.0, change=_zero_rows),
        _case("linear, large values", "linear", 64, change=_large),
        _case("gated, one token", "gated", 1, 3, state=True),
        _case("gated, odd sizes", "gated", 7, 3, (3, 3), 5, 7),
        _case("gated, a head", "gated", 255, 1, (4, 2), 64, 32, state=True),
        _case("gated, a key channel", "gated", 255, 3, (2, 2), 16, 24, per_key=True, state=True),
        _case("gated, long decay", "gated", 1024, 1, decay=(1e-6, 1e-3)),
        _case("gated, steep decay a key channel", "gated", 255, 1, decay=(1.0, 64.0), per_key=True),
        _case("gated, every decay", "gated", 1024, 1, (2, 2), 16, 16, decay=(1e-4, 64.0), per_key=True, change=_no_decay),
        _case("gated, long", "gated", 4096, 1, (2, 1), 16, 8, state=True),
        _case("delta, one token", "delta", 1, 3, state=True),
        _case("delta", "delta", 64, 3, (4, 2), 16, 24, state=True),
        _case("delta, one beta for all heads", "delta", 255, 1, shared_beta=True, change=_zero_beta),
        _case("gated delta, one token", "gated_delta", 1, 3, per_key=True, state=True),
        _case("gated delta, a head", "gated_delta", 255, 1, (4, 2), 64, 32, state=True),
        _case("gated delta, a key channel", "gated_delta", 255, 3, (2, 2), 16, 24, per_key=True, state=True),
        _case("gated delta, every decay", "gated_delta", 1024, 1, decay=(1e-4, 64.0), per_key=True, change=_no_decay),
        _case("gated delta, long", "gated_delta", 4096, 1, (1, 1), 16, 8),
    )
