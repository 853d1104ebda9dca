"""The selective scan in float64, token by token: what every other part is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...op import Arrays


def reference(inputs: Arrays, attributes: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Computes y and last_state in float64; the formulas and shapes are those of the operator's schema."""
    given = {name: np.asarray(value, np.float64) for name, value in inputs.items() if value is not None}
    u, delta, A, B, C = (given[name] for name in ("u", "delta", "A", "B", "C"))
    batch, length, channels = u.shape
    state = A.shape[1]
    groups = B.shape[2] // state
    delta = delta + given.get("delta_bias", 0.0)
    if attributes["delta_softplus"]:
        delta = np.logaddexp(delta, 0.0)
    group = np.arange(channels) // (channels // groups)
    h = given.get("initial_state", np.zeros((batch, channels, state))).copy()
    y = np.empty_like(u)
    for t in reversed(range(length)) if attributes["reverse"] else range(length):
        B_t, C_t = (m[:, t].reshape(batch, groups, state)[:, group] for m in (B, C))
        h = np.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B_t
        y[:, t] = (C_t * h).sum(-1) + given.get("D", 0.0) * u[:, t]
    if "z" in given:
        z = given["z"]
        y = y * z * (0.5 + 0.5 * np.tanh(z / 2))  # the sigmoid without overflow
    return {"y": y, "last_state": h}
