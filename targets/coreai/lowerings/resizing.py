"""Resizing of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import lowering

aten = torch.ops.aten


def _of_torch(operator: Any) -> Callable[..., Any]:
    from torch._decomp import get_decompositions

    found: Callable[..., Any] = get_decompositions([operator])[operator]
    return found


@lowering(aten.upsample_nearest2d.vec)
def upsample_nearest2d(x: Tensor, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None) -> Any:
    """Core AI's own operator looks at the middle of a pixel, torch's `nearest` at its corner: the same for whole factors only."""
    if output_size is None and scale_factors is not None:
        whole = all(float(factor).is_integer() for factor in scale_factors)
    else:
        sizes = zip(output_size or (), x.shape[2:], strict=True)
        whole = all(isinstance(out, int) and isinstance(size, int) and out % size == 0 for out, size in sizes)
    return NotImplemented if whole else _of_torch(aten.upsample_nearest2d.vec)(x, output_size, scale_factors)


@lowering(aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(x: Tensor, output_size: Sequence[int]) -> Any:
    """coreai-torch makes images smaller only, and needs a batch."""
    enlarges = any(isinstance(size, int) and size < out for size, out in zip(x.shape[-2:], output_size, strict=True))
    return _of_torch(aten._adaptive_avg_pool2d.default)(x, output_size) if enlarges or x.dim() != 4 else NotImplemented


@lowering(aten._upsample_bilinear2d_aa.vec, aten._upsample_bilinear2d_aa.default)
def upsample_bilinear2d_aa(x: Tensor, output_size: Sequence[int] | None, align_corners: bool, *scales: Any) -> Any:
    """Bilinear with antialiasing."""
    return _antialiased(x, output_size, align_corners, scales, radius=1.0, weigh=_triangle)


@lowering(aten._upsample_bicubic2d_aa.vec, aten._upsample_bicubic2d_aa.default)
def upsample_bicubic2d_aa(x: Tensor, output_size: Sequence[int] | None, align_corners: bool, *scales: Any) -> Any:
    """Bicubic with antialiasing; the kernel is Keys' with a = -0.5, as in Pillow."""
    return _antialiased(x, output_size, align_corners, scales, radius=2.0, weigh=_keys)


def _antialiased(
    x: Tensor,
    output_size: Sequence[int] | None,
    align_corners: bool,
    scales: tuple[Any, ...],
    *,
    radius: float,
    weigh: Callable[..., Tensor],
) -> Any:
    """Two matrix products, one for each axis: every output is a weighted mean of the inputs under a kernel that widens with the factor.

    As in torch's `UpSampleKernel.cpp` (`_separable_upsample_generic_Nd_kernel_impl_single_dim`).
    """
    given = scales[0] if len(scales) == 1 and isinstance(scales[0], list | tuple) else scales
    factors = [factor if factor else None for factor in given] if given and given != (None,) else [None, None]
    sizes = list(x.shape[-2:])
    if output_size is None:
        output_size = [int(size * factor) for size, factor in zip(sizes, factors, strict=True)]  # type: ignore[operator]  # where no size is given, a factor is
    if not all(isinstance(size, int) for size in (*sizes, *output_size)):
        return NotImplemented
    rows, columns = (
        _weights(size, out, factor, align_corners, radius, weigh)
        for size, out, factor in zip(sizes, output_size, [*factors, None, None][:2], strict=True)
    )
    return torch.matmul(rows.to(x.dtype), torch.matmul(x, columns.t().to(x.dtype)))


def _weights(size: int, out: int, factor: float | None, align_corners: bool, radius: float, weigh: Callable[..., Tensor]) -> Tensor:
    scale = 1.0 / factor if factor else size / out
    if align_corners:
        scale = (size - 1) / (out - 1) if out > 1 else 0.0
    wide = max(scale, 1.0)
    support = radius * wide
    centre = scale * (torch.arange(out, dtype=torch.float64) + 0.5)
    first = (centre - support + 0.5).to(torch.int64).clamp(min=0)
    last = (centre + support + 0.5).to(torch.int64).clamp(max=size)
    at = torch.arange(size)
    weights = weigh((at - centre.unsqueeze(1) + 0.5) / wide)
    weights = torch.where((at >= first.unsqueeze(1)) & (at < last.unsqueeze(1)), weights, 0.0)
    return (weights / weights.sum(1, keepdim=True)).to(torch.float32)


def _triangle(x: Tensor) -> Tensor:
    return (1.0 - x.abs()).clamp(min=0.0)


def _keys(x: Tensor, a: float = -0.5) -> Tensor:
    x = x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))
