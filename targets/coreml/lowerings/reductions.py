"""Reductions."""

# Operators of torch.ops have no types.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from coremltools.converters.mil import Builder
from torch import Tensor

from . import decomposition, lowering

aten = torch.ops.aten
mb: Any = Builder


@decomposition(aten.var.correction)
def var(x: Tensor, dim: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    """As coremltools drops `correction` where no axis is given, and knows 0 and 1 alone."""
    return _moments(x, dim, correction, keepdim)[0]


@decomposition(aten.var.default, aten.var.dim)
def var_unbiased(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    """The older form; see `var`."""
    return var(x, **_of_unbiased(arguments, keywords))


@decomposition(aten.var_mean.correction)
def var_mean(x: Tensor, dim: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Both moments."""
    return _moments(x, dim, correction, keepdim)


@decomposition(aten.var_mean.default, aten.var_mean.dim)
def var_mean_unbiased(x: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The older form; see `var_mean`."""
    return var_mean(x, **_of_unbiased(arguments, keywords))


@decomposition(aten.std.correction)
def std(x: Tensor, dim: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    """As `var`, of numbers made so small that their squares stay in range: a deviation of 300 has a square beyond float16."""
    return std_mean(x, dim, correction=correction, keepdim=keepdim)[0]


@decomposition(aten.std.default, aten.std.dim)
def std_unbiased(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    """The older form; see `std`."""
    return std(x, **_of_unbiased(arguments, keywords))


@decomposition(aten.std_mean.correction)
def std_mean(x: Tensor, dim: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """See `std`."""
    axes = _axes(x, dim)
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    large = centred.abs().amax(axes, keepdim=True)
    small = centred / torch.where(large == 0, 1.0, large)
    deviation = large * torch.sqrt((small * small).mean(axes, keepdim=True) * _correction(x, axes, correction))
    return (deviation, mean) if keepdim else (deviation.squeeze(axes), mean.squeeze(axes))


@decomposition(aten.std_mean.default, aten.std_mean.dim)
def std_mean_unbiased(x: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The older form; see `std_mean`."""
    return std_mean(x, **_of_unbiased(arguments, keywords))


def _of_unbiased(arguments: Sequence[Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments (unbiased) or (dim, unbiased, keepdim) as those of the overload with `correction`."""
    if arguments and isinstance(arguments[0], bool):
        keywords = {"unbiased": arguments[0], **keywords}
    else:
        keywords = {**dict(zip(("dim", "unbiased", "keepdim"), arguments, strict=False)), **keywords}
    return {"dim": keywords.get("dim"), "correction": int(keywords.get("unbiased", True)), "keepdim": keywords.get("keepdim", False)}


def _moments(x: Tensor, dim: Sequence[int] | None, correction: Any, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The mean square of what is left without the mean: E[x^2] - E[x]^2 would cancel."""
    axes = _axes(x, dim)
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    variance = (centred * centred).mean(axes, keepdim=keepdim) * _correction(x, axes, correction)
    return variance, mean if keepdim else mean.squeeze(axes)


def _correction(x: Tensor, axes: Sequence[int], correction: Any) -> Any:
    count: Any = math.prod(x.shape[axis] for axis in axes)
    freedom = count - (1 if correction is None else correction)
    if isinstance(count, int):
        return count / freedom if freedom > 0 else math.inf
    return count / freedom


def _axes(x: Tensor, dim: Sequence[int] | int | None) -> list[int]:
    if isinstance(dim, int):
        return [dim % x.dim()]
    return list(range(x.dim())) if dim is None or not len(dim) else [axis % x.dim() for axis in dim]


@decomposition(aten.mean.default, aten.mean.dim)
def mean(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """As coremltools drops `dtype`, and has integers for means of integers."""
    if dtype is None or dtype == x.dtype:
        return NotImplemented
    return torch.mean(x.to(dtype), _axes(x, dim), keepdim)


@decomposition(aten.sum.default, aten.sum.dim_IntList)
def total(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """As coremltools drops `dtype`, and sums booleans as int32 alone."""
    if dtype is None or dtype == x.dtype:
        return NotImplemented
    return torch.sum(x.to(dtype), _axes(x, dim), keepdim)


def _typed(operator: Any) -> None:
    def apply(x: Tensor, *arguments: Any, dtype: torch.dtype | None = None) -> Any:
        return NotImplemented if dtype is None or dtype == x.dtype else operator(x.to(dtype), *arguments)

    apply.__doc__ = "As coremltools drops `dtype`, or has no operation that changes it."
    decomposition(operator)(apply)


for _operator in (
    aten.cumprod.default,
    aten.linalg_norm.default,
    aten.linalg_norm.ord_str,
    aten.linalg_vector_norm.default,
    aten.prod.default,
    aten.prod.dim_int,
):
    _typed(_operator)


@decomposition(aten.argmax.default)
def argmax(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """As coremltools takes no axis for the last one."""
    if dim is not None:
        return NotImplemented
    found = torch.argmax(x.reshape(-1), 0)
    return found.reshape([1] * x.dim()) if keepdim else found


@decomposition(aten.argmin.default)
def argmin(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """See `argmax`."""
    if dim is not None:
        return NotImplemented
    found = torch.argmin(x.reshape(-1), 0)
    return found.reshape([1] * x.dim()) if keepdim else found


def _truth(operator: Any) -> None:
    def apply(x: Tensor, *arguments: Any) -> Any:
        return NotImplemented if x.dtype == torch.bool else operator(x != 0, *arguments)

    apply.__doc__ = "As coremltools takes negative numbers for false."
    decomposition(operator)(apply)


for _operator in (aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims):
    _truth(_operator)


@decomposition(aten.aminmax.default)
def aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Both extrema."""
    axes = _axes(x, dim)
    return torch.amin(x, axes, keepdim), torch.amax(x, axes, keepdim)


@lowering(aten.prod.default)
def prod(x: Any, *, dtype: int | None = None) -> Any:  # noqa: ARG001 - see `_typed`
    """As coremltools has none."""
    return mb.reduce_prod(x=x, axes=None, keep_dims=False)


@lowering(aten.prod.dim_int)
def prod_along(x: Any, dim: int, keepdim: bool = False, *, dtype: int | None = None) -> Any:  # noqa: ARG001 - as ATen's
    """As coremltools has none."""
    return mb.reduce_prod(x=x, axes=[dim], keep_dims=keepdim)


@decomposition(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def count_nonzero(x: Tensor, dim: Sequence[int] | None = None) -> Tensor:
    """As a sum."""
    return (x != 0).to(torch.int32).sum(_axes(x, dim))


@decomposition(aten.nansum.default)
def nansum(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """A sum without what is not a number."""
    x = x if dtype is None else x.to(dtype)
    return torch.where(x != x, 0.0, x).sum(_axes(x, dim), keepdim)  # noqa: PLR0124 - so NaN is told


@decomposition(aten.cummax.default)
def cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest so far, and where it was seen last."""
    return _cumulative(x, dim, torch.gt, -torch.inf)


@decomposition(aten.cummin.default)
def cummin(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The smallest so far, and where it was seen last."""
    return _cumulative(x, dim, torch.lt, torch.inf)


def _cumulative(x: Tensor, dim: int, wins: Any, worst: float) -> Any:
    """In as many steps as the length has bits: each place is compared with the one 1, 2, 4, ... before it."""
    length = x.shape[dim]
    if not isinstance(length, int) or not x.is_floating_point() or not x.dim():
        return NotImplemented
    at = torch.arange(length, dtype=torch.int32).reshape([-1 if axis == dim % x.dim() else 1 for axis in range(x.dim())]).expand(x.shape)
    step = 1
    while step < length:
        shape = [step if axis == dim % x.dim() else size for axis, size in enumerate(x.shape)]
        before = torch.cat([torch.full(shape, worst, dtype=x.dtype), x.narrow(dim, 0, length - step)], dim)
        at_before = torch.cat([torch.zeros(shape, dtype=at.dtype), at.narrow(dim, 0, length - step)], dim)
        better = wins(before, x)
        x, at, step = torch.where(better, before, x), torch.where(better, at_before, at), step * 2
    return x, at.to(torch.int64)
