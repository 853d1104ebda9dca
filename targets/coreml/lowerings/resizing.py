"""Resizing of images: each axis is a choice of elements, or a product with a matrix from the input's places to the output's.

coremltools computes the places of a factor that is not whole with a factor that it has nudged, and lacks the rest. What MIL resizes by a
whole factor stays its own operation. The rules are those of torch's `UpSample.h` (`area_pixel_compute_scale` and
`area_pixel_compute_source_index`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder
from numpy.typing import NDArray

from . import lowering

aten = torch.ops.aten
mb: Any = Builder

Matrix = NDArray[np.float64]
Weights = Callable[[int, int, float | None, bool], Matrix]
"""(size, target, factor, align_corners) to a matrix (target, size)."""


def _nearest(operator: Any, rank: int, *, middle: bool) -> None:
    def lower(x: Any, output_size: Sequence[Any] | None, *given: Any) -> Any:
        sizes, targets, factors = _sizes(x, output_size, given, rank)
        if targets is None:
            return NotImplemented
        if rank == 2 and x.rank == 4 and _whole(sizes, targets, factors):
            # Either rule takes the same elements.
            height, width = (float(target // size) for target, size in zip(targets, sizes, strict=True))
            return mb.upsample_nearest_neighbor(x=x, scale_factor_height=height, scale_factor_width=width)
        for axis, (size, target, factor) in enumerate(zip(sizes, targets, factors, strict=True), start=x.rank - rank):
            scale = np.float32(1.0 / factor if factor else size / target)  # torch computes places in float32
            at = np.floor((np.arange(target, dtype=np.float32) + np.float32(0.5 * middle)) * scale).astype(np.int32)
            if not np.array_equal(at, np.arange(size)):
                x = mb.gather(x=x, indices=np.minimum(at, size - 1), axis=axis)
        return mb.identity(x=x)

    lowering(operator)(lower)


for _rank in (1, 2, 3):
    for _overload in ("vec", "default"):
        _nearest(getattr(getattr(aten, f"upsample_nearest{_rank}d"), _overload), _rank, middle=False)
        _nearest(getattr(getattr(aten, f"_upsample_nearest_exact{_rank}d"), _overload), _rank, middle=True)


def _weighted(operator: Any, rank: int, weights: Weights) -> None:
    def lower(x: Any, output_size: Sequence[Any] | None, align_corners: bool, *given: Any) -> Any:
        sizes, targets, factors = _sizes(x, output_size, given, rank)
        if targets is None:
            return NotImplemented
        if weights is linear and rank == 2 and _whole(sizes, targets, factors):
            height, width = (float(target // size) for target, size in zip(targets, sizes, strict=True))
            return mb.upsample_bilinear(x=x, scale_factor_height=height, scale_factor_width=width, align_corners=bool(align_corners))
        for axis, (size, target, factor) in enumerate(zip(sizes, targets, factors, strict=True), start=x.rank - rank):
            x = _product(x, axis, weights(size, target, factor, bool(align_corners)).astype(np.float32))
        return x

    lowering(operator)(lower)


def _product(x: Any, axis: int, matrix: NDArray[np.float32]) -> Any:
    """The matrix (target, size) times one axis of x."""
    if axis == x.rank - 1:
        return mb.matmul(x=x, y=matrix, transpose_y=True)
    if axis == x.rank - 2:
        return mb.matmul(x=matrix, y=x)
    order = [i for i in range(x.rank) if i != axis] + [axis]
    y = mb.matmul(x=mb.transpose(x=x, perm=order), y=matrix, transpose_y=True)
    return mb.transpose(x=y, perm=[order.index(i) for i in range(x.rank)])


def _scale(size: int, target: int, factor: float | None, align_corners: bool) -> float:
    if align_corners:
        return (size - 1) / (target - 1) if target > 1 else 0.0
    return 1.0 / factor if factor else size / target


def _places(size: int, target: int, factor: float | None, align_corners: bool) -> Matrix:
    scale = _scale(size, target, factor, align_corners)
    at = np.arange(target, dtype=np.float64)
    return at * scale if align_corners else (at + 0.5) * scale - 0.5


def _spread(size: int, target: int, taps: list[tuple[Matrix, Matrix]]) -> Matrix:
    """A matrix (target, size) from (place, weight) of each tap, both of length target; places beyond the border are at it."""
    matrix = np.zeros((target, size))
    for place, weight in taps:
        np.add.at(matrix, (np.arange(target), np.clip(place, 0, size - 1).astype(np.int64)), weight)
    return matrix


def linear(size: int, target: int, factor: float | None, align_corners: bool) -> Matrix:
    """Between the two nearest."""
    at = np.maximum(_places(size, target, factor, align_corners), 0.0)
    low = np.floor(at)
    return _spread(size, target, [(low, 1.0 - (at - low)), (low + 1.0, at - low)])


def cubic(size: int, target: int, factor: float | None, align_corners: bool) -> Matrix:
    """Among four, under Keys' kernel with a = -0.75 (Keys, Cubic convolution interpolation, 1981)."""
    at = _places(size, target, factor, align_corners)
    low = np.floor(at)
    return _spread(size, target, [(low + i, _keys(at - low - i, -0.75)) for i in (-1.0, 0.0, 1.0, 2.0)])


def linear_antialiased(size: int, target: int, factor: float | None, align_corners: bool) -> Matrix:
    """Under a triangle that widens with the factor."""
    return _antialiased(size, target, factor, align_corners, 1.0, lambda x: np.maximum(1.0 - np.abs(x), 0.0))


def cubic_antialiased(size: int, target: int, factor: float | None, align_corners: bool) -> Matrix:
    """Under Keys' kernel with a = -0.5, as in Pillow, that widens with the factor."""
    return _antialiased(size, target, factor, align_corners, 2.0, lambda x: _keys(x, -0.5))


def _antialiased(
    size: int, target: int, factor: float | None, align_corners: bool, radius: float, kernel: Callable[[Matrix], Matrix]
) -> Matrix:
    """As in torch's `UpSampleKernel.cpp` (`_separable_upsample_generic_Nd_kernel_impl_single_dim`)."""
    scale = _scale(size, target, factor, align_corners)
    wide = max(scale, 1.0)
    centre = scale * (np.arange(target, dtype=np.float64) + 0.5)
    first = np.maximum((centre - radius * wide + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + radius * wide + 0.5).astype(np.int64), size)
    at = np.arange(size)
    rows = kernel((at - centre[:, None] + 0.5) / wide)
    rows = np.where((at >= first[:, None]) & (at < last[:, None]), rows, 0.0)
    return rows / rows.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]  # untyped


def _keys(x: Matrix, a: float) -> Matrix:
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


for _overload in ("vec", "default"):
    _weighted(getattr(aten.upsample_linear1d, _overload), 1, linear)
    _weighted(getattr(aten.upsample_bilinear2d, _overload), 2, linear)
    _weighted(getattr(aten.upsample_trilinear3d, _overload), 3, linear)
    _weighted(getattr(aten.upsample_bicubic2d, _overload), 2, cubic)
    _weighted(getattr(aten._upsample_bilinear2d_aa, _overload), 2, linear_antialiased)
    _weighted(getattr(aten._upsample_bicubic2d_aa, _overload), 2, cubic_antialiased)


def _sizes(
    x: Any, output_size: Sequence[Any] | None, given: Sequence[Any], rank: int
) -> tuple[list[int], list[int] | None, list[float | None]]:
    """The sizes before, those after (None where either varies), and the factors, which are given in a list (`vec`) or one by one."""
    listed = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    factors: list[float | None] = [float(factor) if factor else None for factor in listed]
    factors = [*factors, *[None] * rank][:rank]
    sizes = x.shape[-rank:]
    if not all(isinstance(size, int | np.integer) for size in (*sizes, *(output_size or ()))):
        return [], None, factors
    sizes = [int(size) for size in sizes]
    if output_size is not None:
        return sizes, [int(size) for size in output_size], factors
    return sizes, [int(size * (factor or 1.0)) for size, factor in zip(sizes, factors, strict=True)], factors


def _whole(sizes: Sequence[int], targets: Sequence[int], factors: Sequence[float | None]) -> bool:
    """Whether each size is a multiple of the one before, and the factor that is given is just that."""
    return all(t % s == 0 and f in (None, t / s) for s, t, f in zip(sizes, targets, factors, strict=True))
