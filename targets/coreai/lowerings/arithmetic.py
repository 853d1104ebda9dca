"""Sums, remainders, shifts, and functions that need more digits than the converter gives them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import lowering

aten = torch.ops.aten


@lowering(aten.add.Tensor, aten.add.Scalar)
def add(x: Tensor, y: Any, *, alpha: Any = 1) -> Any:
    """coreai-torch drops `alpha`; see also `_in_float`."""
    return _in_float(torch.add, x, y) if alpha == 1 else x + y * alpha


@lowering(aten.sub.Tensor, aten.sub.Scalar)
def sub(x: Tensor, y: Any, *, alpha: Any = 1) -> Any:
    """coreai-torch drops `alpha`; see also `_in_float`."""
    return _in_float(torch.sub, x, y) if alpha == 1 else x - y * alpha


@lowering(aten.mul.Tensor, aten.mul.Scalar)
def mul(x: Any, y: Any) -> Any:
    """The run time has no product of booleans; see also `_in_float`."""
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype == torch.bool:
        return torch.logical_and(x, y)
    return _in_float(torch.mul, x, y)


@lowering(aten.div.Tensor, aten.div.Scalar)
def div(x: Any, y: Any) -> Any:
    """See `_in_float`."""
    return _in_float(torch.div, x, y)


@lowering(aten.pow.Tensor_Scalar, aten.pow.Scalar)
def power(x: Any, y: Any) -> Any:
    """See `_in_float`."""
    return _in_float(torch.pow, x, y)


@lowering(aten.scalar_tensor.default)
def scalar_tensor(value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    """coreai-torch makes the number a float16 first; see `_in_float`."""
    return torch.full((), value, dtype=dtype or torch.get_default_dtype()) if isinstance(value, float) else NotImplemented


@lowering(aten.arange.start_step)
def arange(start: Any, end: Any, step: Any = 1, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    """coreai-torch makes the numbers float16 first; see `_in_float`."""
    numbers = (start, end, step)
    if not all(isinstance(n, int | float) for n in numbers) or not any(isinstance(n, float) for n in numbers):
        return NotImplemented
    count = math.ceil((end - start) / step)
    return (torch.arange(count).to(torch.float32) * step + start).to(dtype or torch.get_default_dtype())


@lowering(aten.remainder.Scalar)
def remainder(x: Tensor, y: Any) -> Tensor:
    """coreai-torch has the overload with two tensors alone."""
    dtype = torch.result_type(x, y)
    return torch.remainder(x.to(dtype), torch.full((), y, dtype=dtype))


@lowering(aten.bitwise_not.default)
def bitwise_not(x: Tensor) -> Any:
    """coreai-torch goes through float32, which has 24 bits."""
    return NotImplemented if x.dtype == torch.bool else -1 - x


@lowering(aten.__lshift__.Scalar)
def shift_left(x: Any, bits: int) -> Any:
    """As a product."""
    return x * 2**bits


@lowering(aten.__rshift__.Scalar)
def shift_right(x: Tensor, bits: int) -> Any:
    """As a quotient, rounded down, which is what a shift of a signed number does."""
    return torch.div(x, 2**bits, rounding_mode="floor")


@lowering(aten.clamp.default)
def clamp(x: Tensor, low: Any = None, high: Any = None) -> Any:
    """coreai-torch casts float bounds of integers to integers."""
    dtype = x.dtype
    for bound in (low, high):
        if bound is not None:
            dtype = torch.promote_types(dtype, torch.result_type(x, bound))
    return NotImplemented if dtype == x.dtype else torch.clamp(x.to(dtype), low, high)


@lowering(aten.atan2.default)
def atan2(y: Tensor, x: Tensor) -> Any:
    """coreai-torch divides integers as integers."""
    if x.is_floating_point() and y.is_floating_point():
        return NotImplemented
    return torch.atan2(y.to(torch.float32), x.to(torch.float32))


@lowering(aten.log1p.default)
def log1p(x: Tensor) -> Tensor:
    """coreai-torch takes the logarithm of 1 + x, which has no digits of a small x.

    For -0.3 < x < 0.5, log(1 + x) = 2 atanh(w) with w = x / (2 + x), |w| <= 0.2, and its series up to w^13, whose remainder is below 1e-10
    of the whole. Correcting by what rounding does to 1 + x (Kahan) is no way: coreai-core 1.0.0b3 simplifies (x + 1) - 1 to x.
    """
    if not x.is_floating_point():
        x = x.to(torch.float32)
    w = x / (x + 2.0)
    square = w * w
    series = torch.full_like(w, 1.0 / 13.0)
    for k in range(11, 0, -2):
        series = series * square + 1.0 / k
    return torch.where((x > -0.3) & (x < 0.5), 2.0 * w * series, torch.log(x + 1.0))


@lowering(aten.expm1.default)
def expm1(x: Tensor) -> Tensor:
    """coreai-torch subtracts 1 from exp(x), which leaves no digits of a small x: tanh(x / 2) (exp(x) + 1) keeps them."""
    if not x.is_floating_point():
        x = x.to(torch.float32)
    return torch.tanh(x * 0.5) * (torch.exp(x) + 1.0)


@lowering(aten.ldexp.Tensor)
def ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    """The product of x and 2^exponent."""
    return x * torch.pow(2.0, exponent)


def _in_float(operator: Callable[..., Tensor], x: Any, y: Any) -> Any:
    """A call with a number and a tensor of integers.

    coreai-torch 0.4.3 makes a number a float16 where no operand is a float32: 0.1 times an integer has three digits (`get_operand`).
    """
    for number, tensor in ((x, y), (y, x)):
        if isinstance(number, float) and isinstance(tensor, Tensor) and not tensor.is_floating_point():
            dtype = torch.result_type(tensor, number)
            return operator(*(v.to(dtype) if isinstance(v, Tensor) else v for v in (x, y)))
    return NotImplemented


@lowering(aten._trilinear.default)
def trilinear(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    summed: list[int],
    unroll_dim: int = 1,  # noqa: ARG001 - the operator's
) -> Tensor:
    """The product of three tensors with axes of size 1 inserted, summed over some axes: `nn.Bilinear`."""
    for axis in expand1:
        x = x.unsqueeze(axis)
    for axis in expand2:
        y = y.unsqueeze(axis)
    for axis in expand3:
        z = z.unsqueeze(axis)
    return (x * y * z).sum(summed)
