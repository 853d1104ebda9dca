"""Sorting, and what is read off a sorted row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import decomposition

aten = torch.ops.aten

_MOST = 1024
"""The longest row that is sorted stably: every pair of it is compared."""


@decomposition(aten.sort.stable)
def sort(x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """As coremltools has no stable one; the order of equal numbers in Core ML is not documented."""
    if not stable:
        return aten.sort.default(x, dim, descending)
    order = argsort(x, stable=True, dim=dim, descending=descending)
    return NotImplemented if order is NotImplemented else (torch.gather(x, dim, order), order)


@decomposition(aten.argsort.stable)
def argsort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    """The order of the places that the numbers will have, which differ from one another."""
    if not stable:
        return aten.argsort.default(x, dim, descending)
    length = x.shape[dim]
    if not isinstance(length, int) or length > _MOST:
        return NotImplemented
    row = x.movedim(dim, -1)
    mine, other = row.unsqueeze(-1), row.unsqueeze(-2)
    at = torch.arange(length)
    first = (mine < other if descending else mine > other) | ((mine == other) & (at.unsqueeze(-1) > at))
    place = first.to(x.dtype if x.is_floating_point() else torch.int32).sum(-1)
    return aten.argsort.default(place, -1).movedim(-1, dim)


@decomposition(aten.kthvalue.default)
def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    """The k-th smallest: the last of the k smallest."""
    values, indices = torch.topk(x, k, dim, largest=False)
    values, indices = values.narrow(dim, k - 1, 1), indices.narrow(dim, k - 1, 1)
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


@decomposition(aten.median.default)
def median(x: Tensor) -> Any:
    """The lower one of an even count, as torch has it."""
    return kthvalue(x.reshape(-1), (x.numel() + 1) // 2, 0)[0] if isinstance(x.numel(), int) else NotImplemented


@decomposition(aten.median.dim)
def median_along(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    """See `median`."""
    return kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim) if isinstance(x.shape[dim], int) else NotImplemented


@decomposition(aten.quantile.scalar)
def quantile(x: Tensor, q: float, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear") -> Any:
    """Between two of the sorted numbers."""
    if dim is None:
        found = quantile(x.reshape(-1), q, 0, interpolation=interpolation)
        return found.reshape([1] * x.dim()) if keepdim and found is not NotImplemented else found
    length = x.shape[dim]
    if not isinstance(length, int):
        return NotImplemented
    at = q * (length - 1)
    low = int(at)
    part = {"linear": at - low, "lower": 0.0, "higher": float(at > low), "midpoint": 0.5 * (at > low), "nearest": float(round(at) - low)}
    ordered = torch.topk(x, length, dim, largest=False).values
    below, above = ordered.narrow(dim, low, 1), ordered.narrow(dim, min(low + 1, length - 1), 1)
    found = torch.lerp(below, above, part[interpolation])
    return found if keepdim else found.squeeze(dim)
