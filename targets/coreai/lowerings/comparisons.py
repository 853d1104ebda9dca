"""Comparisons, where one side may be NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import lowering

aten = torch.ops.aten


@lowering(aten.ge.Scalar, aten.ge.Tensor)
def ge(x: Tensor, y: Any) -> Any:
    """coreai-torch says not (x < y), which is true of NaN."""
    return torch.logical_or(x > y, x == y) if _may_be_nan(x, y) else NotImplemented


@lowering(aten.le.Scalar, aten.le.Tensor)
def le(x: Tensor, y: Any) -> Any:
    """coreai-torch says not (x > y), which is true of NaN."""
    return torch.logical_or(x < y, x == y) if _may_be_nan(x, y) else NotImplemented


@lowering(aten.isnan.default)
def isnan(x: Tensor) -> Tensor:
    """What differs from itself."""
    return x != x if x.is_floating_point() else torch.zeros_like(x, dtype=torch.bool)  # noqa: PLR0124 - so NaN is told


@lowering(aten.isfinite.default)
def isfinite(x: Tensor) -> Tensor:
    """Less than infinity on both sides."""
    return x.abs() < torch.inf if x.is_floating_point() else torch.ones_like(x, dtype=torch.bool)


def _may_be_nan(x: Any, y: Any) -> bool:
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in (x, y))
