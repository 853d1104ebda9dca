"""Operations on each element: arithmetic, comparisons, activations, casts."""

# numpy types the arithmetic of arrays of any dtype as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .registry import OPERATIONS, Array, Operation, operation, tensor

_BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "pow": np.power,
    "mod": np.mod,
    "floor_div": np.floor_divide,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}

_UNARY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "exp": np.exp,
    "exp2": np.exp2,
    "floor": np.floor,
    "identity": np.asarray,
    "logical_not": np.logical_not,
    "round": np.round,
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
}


def _binary(function: Callable[..., Any]) -> Operation:
    def apply(x: Array, y: Array) -> Any:  # numpy's own have no names for their operands
        return function(x, y)

    return apply


def _unary(function: Callable[..., Any]) -> Operation:
    def apply(x: Array) -> Any:
        return function(x)

    return apply


OPERATIONS.update({name: _binary(function) for name, function in _BINARY.items()})
OPERATIONS.update({name: _unary(function) for name, function in _UNARY.items()})


@operation("real_div")
def _real_div(x: Array, y: Array) -> Array:
    return x / y if np.issubdtype(x.dtype, np.floating) else np.trunc(x / y)


@operation("log")
def _log(x: Array, epsilon: Array) -> Array:
    return np.log(x + epsilon)


@operation("rsqrt")
def _rsqrt(x: Array, epsilon: Array) -> Array:
    return 1 / np.sqrt(x + epsilon)


@operation("inverse")
def _inverse(x: Array, epsilon: Array) -> Array:
    return 1 / (x + epsilon)


@operation("clip")
def _clip(x: Array, alpha: Array, beta: Array) -> Array:
    return np.clip(x, alpha, beta)


@operation("threshold")
def _threshold(x: Array, alpha: Array) -> Array:
    return np.maximum(x, alpha)


@operation("select")
def _select(cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


_DTYPES = {"fp16": np.float16, "fp32": np.float32, "bool": np.bool_}


@operation("cast")
def _cast(x: Array, dtype: str) -> Array:
    return np.asarray(x).astype(_DTYPES[dtype] if dtype in _DTYPES else np.dtype(dtype))


# Activations.


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def erf(x: Array) -> Array:
    """The error function; numpy has none."""
    import torch

    return torch.erf(tensor(x.astype(np.float32, copy=False))).numpy()


OPERATIONS["sigmoid"] = _unary(sigmoid)
OPERATIONS["erf"] = _unary(erf)
OPERATIONS["relu"] = _unary(lambda x: np.maximum(x, 0))
OPERATIONS["relu6"] = _unary(lambda x: np.clip(x, 0, 6))
OPERATIONS["silu"] = _unary(lambda x: x * sigmoid(x))
OPERATIONS["softplus"] = _unary(lambda x: np.logaddexp(x, np.float32(0)))
OPERATIONS["softsign"] = _unary(lambda x: x / (1 + np.abs(x)))


@operation("gelu")
def _gelu(x: Array, mode: str = "EXACT") -> Array:
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * (x * x * x))))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    return 0.5 * x * (1 + erf(x * np.float32(np.sqrt(0.5))))


@operation("elu")
def _elu(x: Array, alpha: Array) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


@operation("leaky_relu")
def _leaky_relu(x: Array, alpha: Array) -> Array:
    return np.where(x >= 0, x, alpha * x)


@operation("prelu")
def _prelu(x: Array, alpha: Array) -> Array:
    return np.where(x >= 0, x, alpha.reshape(-1, *[1] * (x.ndim - 2)) * x)


@operation("clamped_relu")
def _clamped_relu(x: Array, alpha: Array, beta: Array) -> Array:
    return np.minimum(np.where(x >= 0, x, alpha * x), beta)


@operation("thresholded_relu")
def _thresholded_relu(x: Array, alpha: Array) -> Array:
    return np.where(x >= alpha, x, 0)


@operation("linear_activation")
def _linear_activation(x: Array, alpha: Array, beta: Array) -> Array:
    return alpha * x + beta


@operation("scaled_tanh")
def _scaled_tanh(x: Array, alpha: Array, beta: Array) -> Array:
    return alpha * np.tanh(beta * x)


@operation("sigmoid_hard")
def _sigmoid_hard(x: Array, alpha: Array, beta: Array) -> Array:
    return np.clip(alpha * x + beta, 0, 1)


@operation("softplus_parametric")
def _softplus_parametric(x: Array, alpha: Array, beta: Array) -> Array:
    alpha, beta = (p.reshape(-1, *[1] * (x.ndim - 2)) for p in (alpha, beta))
    return alpha * np.logaddexp(beta * x, np.float32(0))
