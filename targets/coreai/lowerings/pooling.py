"""Pooling: how the border is counted, and windows that reach beyond it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....exporter.windows import beyond, in_torch_order, sizes
from . import lowering

aten = torch.ops.aten


@lowering(aten.avg_pool2d.default)
def avg_pool2d(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,), *rest: Any) -> Any:
    """See `_average`."""
    return _average(aten.avg_pool2d.default, 2, x, kernel_size, stride, padding, *rest)


@lowering(aten.avg_pool3d.default)
def avg_pool3d(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,), *rest: Any) -> Any:
    """See `_average`."""
    return _average(aten.avg_pool3d.default, 3, x, kernel_size, stride, padding, *rest)


@lowering(aten.max_pool2d_with_indices.default)
def max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Any:
    """coreai-torch 0.4.3 needs a batch, and computes a size of its own for windows that reach beyond the border."""
    kernel, pads, dilations = sizes(kernel_size, 2), sizes(padding, 2), sizes(dilation, 2)
    strides = sizes(stride, 2) if len(stride) else kernel
    if x.dim() == 4 and not ceil_mode and len(stride):
        return NotImplemented
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    windows = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    ends = [beyond(n, w, s, p, ceil_mode) for n, w, s, p in zip(batched.shape[2:], windows, strides, pads, strict=True)]
    if any(pads) or any(ends):
        batched = F.pad(batched, in_torch_order(pads, [p + e for p, e in zip(pads, ends, strict=True)]), value=-torch.inf)
    # Only the values count: what reads the indices is refused.
    values, indices = aten.max_pool2d_with_indices.default(batched, kernel, strides, [0, 0], dilations)
    return (values, indices) if x.dim() == 4 else (values.squeeze(0), indices.squeeze(0))


def _average(
    pool: Any,
    rank: int,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *rest: Any,
) -> Any:
    """coreai-torch 0.4.3 counts zeros beyond the border whatever `count_include_pad` says, ignores `ceil_mode`, and fails for some calls
    that give more than four arguments.

    The mean of a window that holds zeros is divided by the share of it that counts: the mean of a mask of ones.
    """
    given: tuple[Any, ...] = (*rest, *(False, True, None)[len(rest) :])
    ceil_mode, count_include_pad, divisor = given
    # torch leaves out what is the default: no padding.
    if not rest and x.dim() == rank + 2 and len(stride) == rank and (len(padding) == rank or tuple(padding) == (0,)):
        return NotImplemented
    kernel, pads = sizes(kernel_size, rank), sizes(padding, rank)
    strides = sizes(stride, rank) if len(stride) else kernel
    batched = x if x.dim() == rank + 2 else x.unsqueeze(0)
    extent = batched.shape[2:]
    ends = [beyond(n, k, s, p, ceil_mode) for n, k, s, p in zip(extent, kernel, strides, pads, strict=True)]
    if any(pads) or any(ends):
        batched = F.pad(batched, in_torch_order(pads, [p + e for p, e in zip(pads, ends, strict=True)]))
    mean = pool(batched, kernel, strides, [0] * rank)
    if divisor is not None:
        mean = mean * (math.prod(kernel) / divisor)
    elif any(ends) or (any(pads) and not count_include_pad):
        counted = torch.ones([1, 1, *extent], dtype=x.dtype)
        counted = F.pad(counted, in_torch_order(pads, pads), value=1.0 if count_include_pad else 0.0)
        counted = F.pad(counted, in_torch_order([0] * rank, ends))
        mean = mean / pool(counted, kernel, strides, [0] * rank)
    return mean if x.dim() == rank + 2 else mean.squeeze(0)
