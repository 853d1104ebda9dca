"""The causal convolution in float64, token by token: what every other part is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...op import Arrays


def reference(inputs: Arrays, attributes: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Computes y and last_state in float64; the formulas and shapes are those of the operator's schema."""
    given = {name: np.asarray(value, np.float64) for name, value in inputs.items() if value is not None}
    x, weight = given["x"], given["weight"][:, 0]
    batch, channels, length = x.shape
    width = weight.shape[1]
    padded = np.concatenate([given.get("initial_state", np.zeros((batch, channels, width - 1))), x], axis=2)
    y = np.empty_like(x)
    for t in range(length):
        y[..., t] = given.get("bias", 0.0) + (weight * padded[..., t : t + width]).sum(-1)
    if attributes["silu"]:
        y = y * (0.5 + 0.5 * np.tanh(y / 2))  # the sigmoid without overflow
    return {"y": y, "last_state": padded[..., length:]}
