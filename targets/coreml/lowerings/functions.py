"""Integers and booleans, where coremltools takes floating-point numbers, or has no operation."""

# Operators of torch.ops have no types.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import decomposition

aten = torch.ops.aten

_OF_REALS = (
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "erf", "erfc", "exp", "exp2", "expm1", "log10", "log1p", "log2",
    "logit", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh",
)  # fmt: skip
"""Functions of a real number, which torch takes integers for."""


def as_real(x: Tensor) -> Tensor:
    """Integers and booleans as float32, which is torch's default dtype."""
    return x if x.is_floating_point() else x.to(torch.float32)


def _of_reals(operator: Any, own: Callable[[Tensor], Any] | None = None) -> None:
    def apply(x: Tensor, *arguments: Any) -> Any:
        if not x.is_floating_point():
            return operator(as_real(x), *arguments)
        return own(x, *arguments) if own is not None else NotImplemented

    decomposition(operator)(apply)


# Those that coremltools lacks, has few digits of, or converts to an operation that MIL has not.


def _acosh(x: Tensor) -> Tensor:
    return torch.log(x + torch.sqrt(x * x - 1.0))


def _asinh(x: Tensor) -> Tensor:
    size = x.abs()
    return torch.log1p(size + size * (size / (1.0 + torch.sqrt(size * size + 1.0)))) * x.sign()


def _erfc(x: Tensor) -> Tensor:
    return 1.0 - torch.erf(x)


def _expm1(x: Tensor) -> Tensor:
    # exp(x) - 1 has no digits of a small x; tanh(x / 2) (exp(x) + 1) keeps them.
    return torch.tanh(x * 0.5) * (torch.exp(x) + 1.0)


def _log1p(x: Tensor) -> Tensor:
    # What rounding does to u = 1 + x it does to u - 1 as well, and their quotient is right (Kahan; Higham, Accuracy and Stability of
    # Numerical Algorithms, 2nd ed., section 1.14.1).
    u = x + 1.0
    exact = (u == 1.0) | (u == torch.inf)
    return torch.where(exact, x, torch.log(u) * (x / torch.where(exact, 1.0, u - 1.0)))


def _log2(x: Tensor) -> Tensor:
    return torch.log(x) * 1.4426950408889634


def _log10(x: Tensor) -> Tensor:
    return torch.log(x) * 0.4342944819032518


def _logit(x: Tensor, eps: float | None = None) -> Tensor:
    x = x if eps is None else x.clamp(eps, 1.0 - eps)
    return torch.log(x / (1.0 - x))


_OWN: dict[str, Callable[..., Tensor]] = {
    "acosh": _acosh, "asinh": _asinh, "erfc": _erfc, "expm1": _expm1, "log10": _log10, "log1p": _log1p, "log2": _log2, "logit": _logit,
}  # fmt: skip

for _name in _OF_REALS:
    _of_reals(getattr(aten, _name).default, _OWN.get(_name))


@decomposition(aten.special_expit.default)
def expit(x: Tensor) -> Tensor:
    """The sigmoid by another name."""
    return torch.sigmoid(as_real(x))


@decomposition(aten.sinc.default)
def sinc(x: Tensor) -> Tensor:
    """sin(pi x) / (pi x), 1 at 0."""
    angle = torch.where(x == 0, 1.0, x * torch.pi)
    return torch.where(x == 0, 1.0, torch.sin(angle) / angle)


@decomposition(aten.xlogy.Tensor)
def xlogy(x: Tensor, y: Tensor) -> Tensor:
    """That is x log(y), which is 0 where x is."""
    return torch.where(x == 0, 0.0, x * torch.log(torch.where(x == 0, 1.0, y)))


# Bits.


@decomposition(aten.bitwise_and.Tensor, aten.__and__.Tensor)
def bitwise_and(x: Tensor, y: Tensor) -> Any:
    """MIL has no bits: of booleans alone."""
    return torch.logical_and(x, y) if x.dtype == y.dtype == torch.bool else NotImplemented


@decomposition(aten.bitwise_and.Scalar, aten.__and__.Scalar)
def bitwise_and_number(x: Tensor, y: Any) -> Any:
    """The lowest bits are a remainder, whatever the sign; other masks are refused."""
    if x.dtype == torch.bool:
        return torch.logical_and(x, torch.full_like(x, bool(y))) if isinstance(y, bool) else NotImplemented
    return torch.remainder(x, y + 1) if y >= 0 and (y & (y + 1)) == 0 else NotImplemented


@decomposition(aten.bitwise_or.Tensor, aten.__or__.Tensor)
def bitwise_or(x: Tensor, y: Tensor) -> Any:
    """MIL has no bits: of booleans alone."""
    return torch.logical_or(x, y) if x.dtype == y.dtype == torch.bool else NotImplemented


@decomposition(aten.bitwise_xor.Tensor, aten.__xor__.Tensor)
def bitwise_xor(x: Tensor, y: Tensor) -> Any:
    """MIL has no bits: of booleans alone."""
    return torch.logical_xor(x, y) if x.dtype == y.dtype == torch.bool else NotImplemented


@decomposition(aten.bitwise_not.default)
def bitwise_not(x: Tensor) -> Tensor:
    """Of an integer, -1 - x."""
    return torch.logical_not(x) if x.dtype == torch.bool else -1 - x


@decomposition(aten.__lshift__.Scalar, aten.bitwise_left_shift.Tensor_Scalar)
def shift_left(x: Tensor, bits: int) -> Tensor:
    """As a product."""
    return x * 2**bits


@decomposition(aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor_Scalar)
def shift_right(x: Tensor, bits: int) -> Tensor:
    """As a quotient, rounded down, which is what a shift of a signed number does."""
    return torch.div(x, 2**bits, rounding_mode="floor")


@decomposition(aten.isinf.default)
def isinf(x: Tensor) -> Tensor:
    """Infinite on either side."""
    return x.abs() == torch.inf if x.is_floating_point() else torch.zeros_like(x, dtype=torch.bool)


@decomposition(aten.isfinite.default)
def isfinite(x: Tensor) -> Tensor:
    """Less than infinite on both sides."""
    return x.abs() < torch.inf if x.is_floating_point() else torch.ones_like(x, dtype=torch.bool)


@decomposition(aten.signbit.default)
def signbit(x: Tensor) -> Tensor:
    """Negative; the zero of Core ML has no sign."""
    return x < 0
