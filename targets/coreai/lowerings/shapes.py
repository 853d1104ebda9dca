"""Views that the converter lacks, as copies of chosen elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import lowering

aten = torch.ops.aten


@lowering(aten.unfold.default)
def unfold(x: Any, dim: int, size: int, step: int) -> Any:
    """Windows of `size` elements, `step` apart, as a last axis."""
    dim %= max(x.dim(), 1)
    count = (x.shape[dim] - size) // step + 1
    at = (torch.arange(count).unsqueeze(1) * step + torch.arange(size)).reshape(-1)
    return torch.index_select(x, dim, at).reshape([*x.shape[:dim], count, size, *x.shape[dim + 1 :]]).movedim(dim + 1, -1)


@lowering(aten.diagonal.default)
def diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """The elements (i, i + offset) of two axes, as a last axis."""
    x = x.movedim((dim1, dim2), (-2, -1))
    rows, columns = x.shape[-2:]
    row, column = max(-offset, 0), max(offset, 0)
    count = max(min(rows - row, columns - column), 0)
    at = torch.arange(count) * (columns + 1) + (row * columns + column)
    return torch.index_select(x.reshape([*x.shape[:-2], rows * columns]), -1, at)
