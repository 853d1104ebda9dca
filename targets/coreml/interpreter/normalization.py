"""Normalisations."""

# numpy types the arithmetic of arrays of any dtype as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import numpy as np

from .registry import Array, along, axes_of, operation


@operation("layer_norm")
def _layer_norm(
    x: Array, axes: Array | None = None, gamma: Array | None = None, beta: Array | None = None, epsilon: Array | float = 1e-5
) -> Array:
    over = axes_of(axes, x.ndim)
    shape = [size if i in over else 1 for i, size in enumerate(x.shape)]
    centred = x - x.mean(axis=over, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(axis=over, keepdims=True) + epsilon)
    if gamma is not None:
        y = y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


@operation("instance_norm")
def _instance_norm(x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Array | float = 1e-5) -> Array:
    over = tuple(range(2, x.ndim))
    centred = x - x.mean(axis=over, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(axis=over, keepdims=True) + epsilon)
    if gamma is not None:
        y = y * along(gamma, 1, x.ndim)
    return y if beta is None else y + along(beta, 1, x.ndim)


@operation("batch_norm")
def _batch_norm(
    x: Array, mean: Array, variance: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Array | float = 1e-5
) -> Array:
    y = (x - along(mean, 1, x.ndim)) / np.sqrt(along(variance, 1, x.ndim) + epsilon)
    if gamma is not None:
        y = y * along(gamma, 1, x.ndim)
    return y if beta is None else y + along(beta, 1, x.ndim)


@operation("l2_norm")
def _l2_norm(x: Array, epsilon: Array | float = 1e-6) -> Array:
    return x / np.sqrt((x * x).sum(axis=(-3, -2, -1), keepdims=True) + epsilon)
