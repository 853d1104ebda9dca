"""Normalised linear attention in float64, as the quadratic form: attention weights first, their sum and product with the values then."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...op import Arrays


def reference(inputs: Arrays, attributes: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Computes y in float64; the formula and shapes are those of the operator's schema."""
    heads = attributes["num_heads"]
    q, k, v = (np.asarray(inputs[name], np.float64) for name in ("q", "k", "v"))
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    weights = np.einsum("bthk,bshk->bhts", np.maximum(q, 0.0), np.maximum(k, 0.0))
    y = np.einsum("bhts,bshv->bthv", weights, v) / (weights.sum(-1).transpose(0, 2, 1)[..., None] + attributes["eps"])
    return {"y": y.reshape(*y.shape[:2], -1)}
