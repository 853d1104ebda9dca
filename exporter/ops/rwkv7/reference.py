"""RWKV-7's time mixing in float64, token by token: what every other part is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...op import Arrays


def reference(inputs: Arrays, attributes: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Computes y and last_state in float64; the formulas and shapes are those of the operator's schema."""
    given = {name: np.asarray(value, np.float64) for name, value in inputs.items() if value is not None}
    heads = attributes["num_heads"]
    batch, length, _ = given["r"].shape
    r, decay, k, v, a, b = (given[name].reshape(batch, length, heads, -1) for name in ("r", "decay", "k", "v", "a", "b"))
    S = given.get("initial_state", np.zeros((batch, heads, k.shape[-1], v.shape[-1]))).copy()
    y = np.empty_like(v)
    for t in range(length):
        removed = np.einsum("bhkv,bhk->bhv", S, a[:, t])
        S = np.exp(decay[:, t])[..., None] * S + b[:, t, ..., None] * removed[..., None, :] + k[:, t, ..., None] * v[:, t, ..., None, :]
        y[:, t] = np.einsum("bhkv,bhk->bhv", S, r[:, t])
    return {"y": y.reshape(batch, length, -1), "last_state": S}
