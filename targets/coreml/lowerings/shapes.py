"""Views, and tensors that are made."""

# Operators of torch.ops have no types.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import decomposition

aten = torch.ops.aten


@decomposition(aten.alias.default)
def alias(x: Tensor) -> Tensor:
    """Itself: coremltools has none."""
    return aten.clone.default(x)


@decomposition(aten.unfold.default)
def unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """Windows of `size` elements, `step` apart, as a last axis."""
    dim %= max(x.dim(), 1)
    count = (x.shape[dim] - size) // step + 1
    parts = [aten.slice.Tensor(x, dim, i, i + (count - 1) * step + 1, step) for i in range(size)]
    return torch.stack(parts, -1)


@decomposition(aten.diagonal.default)
def diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """The elements (i, i + offset) of two axes, as a last axis: in rows laid end to end they lie a row and one element apart."""
    x = x.movedim((dim1, dim2), (-2, -1))
    rows, columns = x.shape[-2:]
    row, column = max(-offset, 0), max(offset, 0)
    count = min(rows - row, columns - column)
    if not isinstance(count, int) or count <= 0:
        return NotImplemented
    first = row * columns + column
    return aten.slice.Tensor(x.reshape([*x.shape[:-2], rows * columns]), -1, first, first + (count - 1) * (columns + 1) + 1, columns + 1)


@decomposition(aten.diag_embed.default)
def diag_embed(x: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    """A matrix with the elements on a diagonal."""
    rank, size = x.dim() + 1, x.shape[-1] + abs(offset)
    row, column = max(-offset, 0), max(offset, 0)
    spread = aten.pad.default(x, [column, row]).unsqueeze(-2) if offset else x.unsqueeze(-2)
    at = torch.arange(size)
    kept = torch.where(at.unsqueeze(1) + offset == at, spread, 0.0 if x.is_floating_point() else 0)
    return kept.movedim((-2, -1), (dim1 % rank, dim2 % rank))


@decomposition(aten.diag.default)
def diag(x: Tensor, diagonal_of: int = 0) -> Any:
    """A matrix of a vector, or the diagonal of a matrix."""
    return diag_embed(x, diagonal_of) if x.dim() == 1 else diagonal(x, diagonal_of)


@decomposition(aten.roll.default)
def roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    """As coremltools wants axes."""
    if len(dims):
        return NotImplemented
    return torch.roll(x.reshape(-1), list(shifts), [0]).reshape(x.shape)


@decomposition(aten.rot90.default)
def rot90(x: Tensor, k: int = 1, dims: Sequence[int] = (0, 1)) -> Tensor:
    """Quarter turns."""
    a, b = dims
    return [x.clone(), x.flip(b).transpose(a, b), x.flip([a, b]), x.transpose(a, b).flip(b)][k % 4]


@decomposition(aten.pixel_shuffle.default)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Any:
    """As coremltools wants one batch axis."""
    if x.dim() == 4:
        return NotImplemented
    y = torch.pixel_shuffle(x.reshape(-1, *x.shape[-3:]), upscale_factor)
    return y.reshape([*x.shape[:-3], *y.shape[-3:]])


@decomposition(aten.pixel_unshuffle.default)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Any:
    """As coremltools wants one batch axis."""
    if x.dim() == 4:
        return NotImplemented
    y = torch.pixel_unshuffle(x.reshape(-1, *x.shape[-3:]), downscale_factor)
    return y.reshape([*x.shape[:-3], *y.shape[-3:]])


@decomposition(aten.channel_shuffle.default)
def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels of all groups by turns."""
    return x.reshape([x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]]).transpose(1, 2).flatten(1, 2)


@decomposition(aten.unsafe_split.Tensor)
def unsafe_split(x: Tensor, size: int, dim: int = 0) -> Any:
    """A split."""
    return torch.split(x, size, dim)


@decomposition(aten.unsafe_split_with_sizes.default)
def unsafe_split_with_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> Any:
    """A split."""
    return torch.split(x, list(sizes), dim)


@decomposition(aten.col2im.default)
def col2im(
    x: Tensor,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Any:
    """`F.fold`: coremltools wants windows that do not overlap. Each element of the window is written to its places, and all are added."""
    if x.dim() == 2:
        return col2im(x.unsqueeze(0), output_size, kernel_size, dilation, padding, stride).squeeze(0)
    (height, width), (kh, kw), (dh, dw), (ph, pw), (sh, sw) = output_size, kernel_size, dilation, padding, stride
    tall, wide = height + 2 * ph, width + 2 * pw
    rows, columns = (tall - dh * (kh - 1) - 1) // sh + 1, (wide - dw * (kw - 1) - 1) // sw + 1
    taps = x.reshape([x.shape[0], -1, kh * kw, rows, columns])  # (batch, channels, taps, rows, columns)
    total: Any = None
    for tap in range(kh * kw):
        top, left = tap // kw * dh, tap % kw * dw
        part = _spread(_spread(taps.select(2, tap), -1, sw), -2, sh)
        part = aten.pad.default(part, [left, wide - left - part.shape[-1], top, tall - top - part.shape[-2]])
        total = part if total is None else total + part
    return aten.slice.Tensor(aten.slice.Tensor(total, -2, ph, ph + height), -1, pw, pw + width)


def _spread(x: Tensor, axis: int, step: int) -> Tensor:
    """Zeros between the elements of an axis."""
    if step == 1:
        return x
    size = x.shape[axis]
    more = torch.stack([x, *[torch.zeros_like(x)] * (step - 1)], x.dim() + axis + 1).flatten(x.dim() + axis, x.dim() + axis + 1)
    return more.narrow(axis, 0, (size - 1) * step + 1)
