"""Causal linear attention in float64, token by token: what every other part is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...op import Arrays


def reference(inputs: Arrays, attributes: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Computes y and last_state in float64; the formulas and shapes are those of the operator's schema."""
    given = {name: np.asarray(value, np.float64) for name, value in inputs.items() if value is not None}
    heads, rule = attributes["kv_num_heads"], attributes["update_rule"]
    batch, length, _ = given["k"].shape
    repeats = attributes["q_num_heads"] // heads
    q = given["q"].reshape(batch, length, heads * repeats, -1)
    k, v = (given[name].reshape(batch, length, heads, -1) for name in ("k", "v"))
    key, value = k.shape[-1], v.shape[-1]
    scale = attributes["scale"] or key**-0.5
    decay = given["decay"].reshape(batch, length, heads, -1) if "gated" in rule else None
    beta = np.broadcast_to(given["beta"], (batch, length, heads)) if "delta" in rule else None
    S = given.get("initial_state", np.zeros((batch, heads, key, value))).copy()
    y = np.empty((batch, length, heads * repeats, value))
    for t in range(length):
        k_t, v_t = k[:, t], v[:, t]
        if decay is not None:
            S = np.exp(decay[:, t])[..., None] * S
        if beta is not None:
            v_t = beta[:, t, :, None] * (v_t - np.einsum("bhkv,bhk->bhv", S, k_t))
        S = S + k_t[..., None] * v_t[..., None, :]
        y[:, t] = scale * np.einsum("bhkv,bhk->bhv", np.repeat(S, repeats, axis=1), q[:, t])
    return {"y": y.reshape(batch, length, -1), "last_state": S}
