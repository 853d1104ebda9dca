"""Operations that reduce axes, order elements, or sum along an axis."""

# numpy types the arithmetic of arrays of any dtype as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .registry import OPERATIONS, Array, Operation, axes_of, operation


def _reduce(function: Callable[..., Any]) -> Operation:
    def apply(x: Array, axes: Array | None = None, keep_dims: Array | bool = False) -> Array:
        result: Array = function(x, axis=axes_of(axes, x.ndim), keepdims=bool(keep_dims))
        return result

    return apply


def _log_sum_exp(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    peak = x.max(axis=axis, keepdims=True)
    result: Array = np.log(np.exp(x - peak).sum(axis=axis, keepdims=True)) + peak
    return result if keepdims else result.squeeze(axis)


OPERATIONS["reduce_sum"] = _reduce(np.sum)
OPERATIONS["reduce_mean"] = _reduce(np.mean)
OPERATIONS["reduce_max"] = _reduce(np.max)
OPERATIONS["reduce_min"] = _reduce(np.min)
OPERATIONS["reduce_prod"] = _reduce(np.prod)
OPERATIONS["reduce_l1_norm"] = _reduce(lambda x, **how: np.sum(np.abs(x), **how))
OPERATIONS["reduce_l2_norm"] = _reduce(lambda x, **how: np.sqrt(np.sum(x * x, **how)))
OPERATIONS["reduce_sum_square"] = _reduce(lambda x, **how: np.sum(x * x, **how))
OPERATIONS["reduce_log_sum"] = _reduce(lambda x, **how: np.log(np.sum(x, **how)))
OPERATIONS["reduce_log_sum_exp"] = _reduce(_log_sum_exp)


def _arg(function: Callable[..., Any]) -> Operation:
    def apply(x: Array, axis: Array | int = -1, keep_dims: Array | bool = False, output_dtype: str = "int32") -> Array:  # noqa: ARG001 - as MIL's
        result: Array = function(x, axis=int(axis), keepdims=bool(keep_dims))
        return result

    return apply


OPERATIONS["reduce_argmax"] = _arg(np.argmax)
OPERATIONS["reduce_argmin"] = _arg(np.argmin)


@operation("cumsum")
def _cumsum(x: Array, axis: Array, exclusive: Array | bool = False, reverse: Array | bool = False) -> Array:
    a = int(axis)
    x = np.flip(x, a) if reverse else x
    sums = np.cumsum(x, axis=a, dtype=x.dtype)
    if exclusive:
        # Shifted, not subtracted: a large element would cancel.
        sums = np.concatenate([np.zeros_like(np.take(x, [0], a)), np.take(sums, range(x.shape[a] - 1), a)], axis=a)
    return np.flip(sums, a) if reverse else sums


@operation("argsort")
def _argsort(x: Array, axis: Array | int = -1, ascending: Array | bool = False) -> Array:
    return np.argsort(x if ascending else -x, axis=int(axis), kind="stable")


@operation("topk")
def _topk(
    x: Array,
    k: Array | int = 1,
    axis: Array | int = -1,
    ascending: Array | bool = False,
    sort: Array | bool = True,  # noqa: ARG001 - sorted is one of the orders that are allowed when it is not asked for
    return_indices: Array | bool = True,
    output_indices_dtype: str = "int32",  # noqa: ARG001 - the output's declared dtype is what counts
) -> tuple[Array, ...]:
    order = np.take(_argsort(x, axis, ascending), range(int(k)), int(axis))
    values = np.take_along_axis(x, order, int(axis))
    return (values, order) if return_indices else (values,)


@operation("softmax")
def _softmax(x: Array, axis: Array | int = -1) -> Array:
    e = np.exp(x - x.max(axis=int(axis), keepdims=True))
    result: Array = e / e.sum(axis=int(axis), keepdims=True)
    return result


@operation("non_zero")
def _non_zero(x: Array) -> Array:
    return np.argwhere(x)
