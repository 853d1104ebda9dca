"""Matrix products, and attention."""

# numpy types the arithmetic of arrays of any dtype as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import numpy as np

from .registry import Array, operation, tensor


def _product(x: Array, y: Array) -> Array:
    """The matrix product. numpy leaves BLAS where the axes of a batch are not in order, as those of heads; torch packs them first."""
    if x.dtype != np.float32 or y.dtype != np.float32 or x.ndim < 2 or y.ndim < 2:
        return np.matmul(x, y)
    return (tensor(x) @ tensor(y)).numpy()


@operation("matmul")
def _matmul(x: Array, y: Array, transpose_x: Array | bool = False, transpose_y: Array | bool = False) -> Array:
    x = np.swapaxes(x, -1, -2) if transpose_x else x
    y = np.swapaxes(y, -1, -2) if transpose_y else y
    return _product(x, y)


@operation("linear")
def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


@operation("einsum")
def _einsum(values: tuple[Array, ...], equation: str) -> Array:
    return np.einsum(equation, *values, optimize=True)


@operation("scaled_dot_product_attention")
def _attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    scores = _product(query, np.swapaxes(key, -1, -2))
    scores *= np.float32(query.shape[-1] ** -0.5)
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, np.float32(-np.inf)) if attn_mask.dtype == bool else scores + attn_mask
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return _product(weights / weights.sum(axis=-1, keepdims=True), value)
