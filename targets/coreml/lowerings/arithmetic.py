"""Sums, quotients and remainders."""

# Operators of torch.ops have no types.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from typing import Any

import torch
from coremltools.converters.mil import Builder
from coremltools.converters.mil.mil import types
from torch import Tensor

from . import decomposition, lowering

aten = torch.ops.aten
mb: Any = Builder


@decomposition(aten.add.Tensor, aten.add.Scalar)
def add(x: Tensor, y: Any, alpha: Any = 1) -> Any:
    """As coremltools drops `alpha` as a keyword, which is how torch.export gives it."""
    return NotImplemented if alpha == 1 else x + y * alpha


@decomposition(aten.sub.Tensor, aten.sub.Scalar)
def sub(x: Tensor, y: Any, alpha: Any = 1) -> Any:
    """As coremltools drops `alpha`."""
    return NotImplemented if alpha == 1 else x - y * alpha


@decomposition(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(x: Tensor, y: Any, alpha: Any = 1) -> Any:
    """As coremltools drops `alpha`, or refuses it."""
    if isinstance(y, Tensor):
        return y - x * alpha if alpha != 1 else y - x
    return -(x * alpha) + y if alpha != 1 else NotImplemented


@lowering(aten.reciprocal.default)
def reciprocal(x: Any) -> Any:
    """As coremltools emits `inverse`, which adds 1e-4 to x."""
    return mb.real_div(x=1.0, y=_floating(x))


@lowering(aten.rsqrt.default)
def rsqrt(x: Any) -> Any:
    """As coremltools leaves MIL's default epsilon, which is added to x."""
    return mb.rsqrt(x=_floating(x), epsilon=0.0)


@lowering(aten.log.default)
def log(x: Any) -> Any:
    """As coremltools leaves MIL's default epsilon, with which the logarithm of 0 is a number."""
    return mb.log(x=_floating(x), epsilon=0.0)


@lowering(aten.floor_divide.default)
def floor_divide(x: Any, y: Any) -> Any:
    """As coremltools makes float32 of the quotient of integers, which is no index then."""
    if _is_integer(x) and _is_integer(y):
        return mb.floor_div(x=x, y=y)
    return mb.floor_div(x=_floating(x), y=_floating(y) if hasattr(y, "dtype") else float(y))


@decomposition(aten.div.Tensor_mode)
def div_rounded(x: Tensor, y: Any, *, rounding_mode: str | None = None) -> Any:
    """As coremltools divides integers in float32."""
    if rounding_mode is None or torch.result_type(x, y).is_floating_point:
        return NotImplemented
    if rounding_mode == "floor":
        return torch.floor_divide(x, y)
    sign = x.sign() * (y.sign() if isinstance(y, Tensor) else (1 if y > 0 else -1))
    return torch.floor_divide(x.abs(), y.abs() if isinstance(y, Tensor) else abs(y)) * sign


@decomposition(aten.remainder.Scalar_Tensor)
def remainder(x: Any, y: Tensor) -> Tensor:
    """As coremltools has the overloads alone whose first operand is a tensor."""
    return torch.remainder(torch.full_like(y, x, dtype=torch.result_type(x, y)), y)


@decomposition(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(x: Tensor, y: Any) -> Tensor:
    """The remainder with the sign of x; of numbers without signs, it is torch's remainder."""
    dtype = torch.result_type(x, y)
    return torch.remainder(x.abs().to(dtype), y.abs() if isinstance(y, Tensor) else abs(y)) * x.sign()


@decomposition(aten.trunc.default, aten.fix.default)
def trunc(x: Tensor) -> Tensor:
    """Rounded towards zero."""
    return x.sign() * x.abs().floor() if x.is_floating_point() else x.clone()


@decomposition(aten.frac.default)
def frac(x: Tensor) -> Tensor:
    """What `trunc` leaves."""
    return x - trunc(x)


@decomposition(aten.round.decimals)
def round_decimals(x: Tensor, *, decimals: int = 0) -> Tensor:
    """As coremltools rounds to integers alone."""
    factor = 10.0 ** abs(decimals)
    return torch.round(x * factor) / factor if decimals >= 0 else torch.round(x / factor) * factor


@decomposition(aten.lerp.Scalar, aten.lerp.Tensor)
def lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    """From one number to the other; either is met where the weight is 0 or 1."""
    if isinstance(weight, Tensor):
        return torch.where(weight.abs() < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))
    return start + weight * (end - start) if abs(weight) < 0.5 else end - (end - start) * (1 - weight)


@decomposition(aten.addcmul.default)
def addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    """That is x + value a b."""
    return x + a * b if value == 1 else x + a * b * value


@decomposition(aten.addcdiv.default)
def addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    """That is x + value a / b."""
    return x + a / b if value == 1 else x + a / b * value


@decomposition(aten.fmax.default)
def fmax(x: Tensor, y: Tensor) -> Tensor:
    """The larger; what is not a number loses."""
    return torch.where(x != x, y, torch.where(y != y, x, torch.maximum(x, y)))  # noqa: PLR0124 - so NaN is told


@decomposition(aten.fmin.default)
def fmin(x: Tensor, y: Tensor) -> Tensor:
    """The smaller; what is not a number loses."""
    return torch.where(x != x, y, torch.where(y != y, x, torch.minimum(x, y)))  # noqa: PLR0124 - so NaN is told


@decomposition(aten.copysign.Tensor, aten.copysign.Scalar)
def copysign(x: Tensor, y: Any) -> Tensor:
    """The magnitude of x with the sign of y; the zero of Core ML has none."""
    return torch.where(y >= 0, x.abs(), -x.abs()) if isinstance(y, Tensor) else x.abs() * (1 if y >= 0 else -1)


@decomposition(aten.hypot.default)
def hypot(x: Tensor, y: Tensor) -> Tensor:
    """The square root of the sum of squares, of numbers made so small that their squares stay in range."""
    large = torch.maximum(x.abs(), y.abs())
    divisor = torch.where(large == 0, 1.0, large)
    return large * torch.sqrt((x / divisor) ** 2 + (y / divisor) ** 2)


@decomposition(aten.logaddexp.default)
def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """The larger, and the softplus of what the smaller is below it."""
    return torch.maximum(x, y) + aten.softplus.default(-(x - y).abs())


@decomposition(aten.logaddexp2.default)
def logaddexp2(x: Tensor, y: Tensor) -> Tensor:
    """The same to the base of 2."""
    ln2 = 0.6931471805599453
    return torch.maximum(x, y) + aten.softplus.default(-(x - y).abs() * ln2) / ln2


@decomposition(aten.ldexp.Tensor)
def ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    """That is x 2^exponent."""
    return x * torch.pow(2.0, exponent.to(torch.float32))


@decomposition(aten.clamp.Tensor)
def clamp(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """As coremltools takes the smaller first, which is another number where the bounds have changed places."""
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


@decomposition(aten.clamp.default)
def clamp_to_numbers(x: Tensor, low: Any = None, high: Any = None) -> Any:
    """As coremltools makes floats of integers that are bounded."""
    dtype = x.dtype
    for bound in (low, high):
        dtype = dtype if bound is None else torch.promote_types(dtype, torch.result_type(x, bound))
    if dtype.is_floating_point:
        return NotImplemented if x.dtype == dtype else torch.clamp(x.to(dtype), low, high)
    x = x if low is None else torch.maximum(x, torch.scalar_tensor(low, dtype=dtype))
    return x if high is None else torch.minimum(x, torch.scalar_tensor(high, dtype=dtype))


@decomposition(aten.atan2.default)
def atan2(y: Tensor, x: Tensor) -> Any:
    """As coremltools divides integers as integers."""
    if y.is_floating_point() and x.is_floating_point():
        return NotImplemented
    return torch.atan2(y.to(torch.float32), x.to(torch.float32))


@decomposition(aten.sgn.default)
def sgn(x: Tensor) -> Tensor:
    """The sign: complex numbers are refused."""
    return torch.sign(x)


@decomposition(aten.heaviside.default)
def heaviside(x: Tensor, values: Tensor) -> Tensor:
    """0 below zero, 1 above, and the values at zero."""
    return torch.where(x == 0, values, (x > 0).to(x.dtype))


def _is_integer(x: Any) -> bool:
    return bool(types.is_int(x.dtype)) if hasattr(x, "dtype") else isinstance(x, int)


def _floating(x: Any) -> Any:
    return x if types.is_float(x.dtype) else mb.cast(x=x, dtype="fp32")
