"""Reductions: variances, extrema and norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import lowering

aten = torch.ops.aten


@lowering(aten.var.correction)
def var(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    """coreai-torch has none."""
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


@lowering(aten.var_mean.correction)
def var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """The mean square of what is left without the mean: E[x^2] - E[x]^2 would cancel."""
    axes = _axes(x, dim)
    count: Any = math.prod(x.shape[axis] for axis in axes)
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    freedom = count - (1 if correction is None else correction)
    if isinstance(freedom, int | float):
        freedom = max(freedom, 0)
    variance = (centred * centred).sum(axes, keepdim=keepdim) / freedom
    return variance, mean if keepdim else mean.squeeze(axes)


@lowering(aten.amax.default)
def amax(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    """coreai-torch takes the axes for given."""
    return NotImplemented if len(dim) else torch.amax(x, list(range(x.dim())), keepdim) if x.dim() else x.clone()


@lowering(aten.amin.default)
def amin(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    """coreai-torch takes the axes for given."""
    return NotImplemented if len(dim) else torch.amin(x, list(range(x.dim())), keepdim) if x.dim() else x.clone()


@lowering(aten.mean.dim)
def mean(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """No axes are all axes; coreai-core 1.0.0b3 ends the process for them."""
    if dim is not None and len(dim):
        return NotImplemented
    x = x if dtype is None else x.to(dtype)
    return torch.mean(x, list(range(x.dim())), keepdim) if x.dim() else x.clone()


@lowering(aten.argmin.default)
def argmin(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The index of the minimum."""
    if dim is None:
        found = torch.min(x.reshape(-1), 0).indices
        return found.reshape([1] * x.dim()) if keepdim else found
    return torch.min(x, dim, keepdim).indices


@lowering(aten.linalg_vector_norm.default)
def vector_norm(
    x: Tensor, ord: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """coreai-torch drops `dtype`, and converts no orders but 0, 1, 2 and infinity."""
    if dtype is not None and dtype != x.dtype:
        x = x.to(dtype)
    elif ord in (0, 1, 2, torch.inf, -torch.inf):
        return NotImplemented
    if ord in (0, 1, 2, torch.inf, -torch.inf):
        return torch.linalg.vector_norm(x, ord, dim, keepdim)
    return torch.pow(torch.pow(x.abs(), ord).sum(_axes(x, dim), keepdim=keepdim), 1.0 / ord)


@lowering(aten._native_batch_norm_legit_no_training.default)
def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, momentum: float, eps: float) -> Any:
    """coreai-torch makes a missing weight or bias a scalar, and then expands it like a vector."""
    if weight is not None and bias is not None:
        return NotImplemented
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, variance, momentum, eps)


@lowering(aten._cdist_forward.default)
def cdist(x: Tensor, y: Tensor, p: float, compute_mode: int | None = None) -> Any:  # noqa: ARG001 - the operator's
    """Distances of the rows of x (..., P, M) and y (..., R, M): (..., P, R). By differences, which do not cancel."""
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, dim=[-1])


def _axes(x: Tensor, dim: Sequence[int] | None) -> list[int]:
    return list(range(x.dim())) if dim is None or not len(dim) else [axis % x.dim() for axis in dim]
