"""Reading and writing by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import lowering

aten = torch.ops.aten


@lowering(aten.gather.default)
def gather(x: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Any:  # noqa: ARG001 - the operator's
    """coreai-torch wants the sizes of x and index to be equal beside `dim`; torch takes an index that is smaller."""
    if x.dim() == 0 or index.dim() == 0:
        return torch.gather(x.reshape(-1), 0, index.reshape(-1)).reshape(index.shape)
    axes = [axis for axis in range(x.dim()) if axis != dim % x.dim() and _smaller(index.shape[axis], x.shape[axis])]
    if not axes:
        return NotImplemented
    for axis in axes:
        x = x.narrow(axis, 0, index.shape[axis])
    return torch.gather(x, dim, index)


@lowering(aten.scatter_add.default)
def scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """coreai-torch has it under its other name."""
    return torch.scatter(x, dim, index, source, reduce="add")


@lowering(aten.scatter_reduce.two)
def scatter_reduce(x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    """Sums and products that begin with x."""
    names = {"sum": "add", "prod": "multiply"}
    return torch.scatter(x, dim, index, source, reduce=names[reduce]) if include_self and reduce in names else NotImplemented


@lowering(aten.index_put.default)
def index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """One value where a mask is set: coreai-torch finds the places at run time, and fails where there are none."""
    mask = indices[0]
    if accumulate or len(indices) != 1 or mask is None or mask.dtype != torch.bool or values.numel() != 1:
        return NotImplemented
    mask = mask.reshape([*mask.shape, *[1] * (x.dim() - mask.dim())])
    return torch.where(mask, values.reshape(()).to(x.dtype), x)


@lowering(aten.bucketize.Tensor)
def bucketize(x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    """How many boundaries lie below each number: torch's decomposition searches, with a data-dependent loop."""
    below = boundaries <= x.unsqueeze(-1) if right else boundaries < x.unsqueeze(-1)
    return below.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


@lowering(aten.searchsorted.Tensor)
def searchsorted(
    boundaries: Tensor,
    x: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Any:
    """See `bucketize`; rows of boundaries (..., N) go with rows of x (..., M)."""
    if sorter is not None:
        boundaries = torch.take_along_dim(boundaries, sorter, -1)
    if boundaries.dim() > 1:
        boundaries = boundaries.unsqueeze(-2)
    return bucketize(x, boundaries, out_int32=out_int32, right=right or side == "right")


@lowering(aten.sort.default)
def sort(x: Tensor, dim: int = -1, descending: bool = False) -> Any:
    """As the first of all of them; the order of equal numbers is not defined in torch either."""
    return torch.topk(x, x.shape[dim], dim, descending) if x.dim() else NotImplemented


def _smaller(size: Any, than: Any) -> bool:
    return isinstance(size, int) and isinstance(than, int) and size < than
