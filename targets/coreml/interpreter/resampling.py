"""Resizing of images, (..., height, width). Each axis is a matrix from the input's places to the output's."""

# numpy types the arithmetic of arrays of any dtype as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import numpy as np

from .registry import Array, operation


def _nearest(x: Array, axis: int, places: Array) -> Array:
    return np.take(x, np.clip(np.floor(places).astype(np.int64), 0, x.shape[axis] - 1), axis=axis)


def _linear(x: Array, axis: int, places: Array) -> Array:
    size = x.shape[axis]
    places = np.clip(places, 0, size - 1)
    low = np.minimum(np.floor(places).astype(np.int64), size - 1)
    part = (places - low).astype(np.float32).reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    return np.take(x, low, axis=axis) * (1 - part) + np.take(x, np.minimum(low + 1, size - 1), axis=axis) * part


def _places(size: int, target: int, scale: float, *, align_corners: bool, half_pixel: bool) -> Array:
    out = np.arange(target, dtype=np.float64)
    if align_corners:
        return out * ((size - 1) / max(target - 1, 1))
    return (out + 0.5) / scale - 0.5 if half_pixel else out / scale


@operation("upsample_nearest_neighbor")
def _upsample_nearest_neighbor(x: Array, scale_factor_height: Array | float = 1.0, scale_factor_width: Array | float = 1.0) -> Array:
    for axis, scale in ((-2, float(scale_factor_height)), (-1, float(scale_factor_width))):
        x = _nearest(x, axis, np.arange(int(x.shape[axis] * scale)) / scale)
    return x


@operation("upsample_bilinear")
def _upsample_bilinear(
    x: Array,
    scale_factor_height: Array | float = 1.0,
    scale_factor_width: Array | float = 1.0,
    align_corners: Array | bool = True,
    half_pixel_centers: Array | bool | None = None,
) -> Array:
    corners = bool(align_corners)
    half = not corners if half_pixel_centers is None else bool(half_pixel_centers)
    for axis, scale in ((-2, float(scale_factor_height)), (-1, float(scale_factor_width))):
        size = x.shape[axis]
        x = _linear(x, axis, _places(size, int(size * scale), scale, align_corners=corners, half_pixel=half))
    return x


@operation("resize_nearest_neighbor")
def _resize_nearest_neighbor(x: Array, target_size_height: Array, target_size_width: Array) -> Array:
    for axis, target in ((-2, int(target_size_height)), (-1, int(target_size_width))):
        x = _nearest(x, axis, np.arange(target) * (x.shape[axis] / target))
    return x


@operation("resize_bilinear")
def _resize_bilinear(
    x: Array, target_size_height: Array | int = 1, target_size_width: Array | int = 1, sampling_mode: str = "DEFAULT"
) -> Array:
    for axis, target in ((-2, int(target_size_height)), (-1, int(target_size_width))):
        x = _linear(x, axis, _grid(sampling_mode, x.shape[axis], target))
    return x


def _grid(mode: str, size: int, target: int) -> Array:
    """Where the targets lie, by the formulas of MIL's documentation of `resize_bilinear`; `_linear` clips them to the input."""
    i, gaps = np.arange(target, dtype=np.float64), max(target - 1, 1)
    if mode == "ALIGN_CORNERS" and target == 1:
        return np.array([(size - 1) / 2])
    if mode in ("ALIGN_CORNERS", "STRICT_ALIGN_CORNERS"):
        return i * ((size - 1) / gaps)
    if mode == "DEFAULT":
        return i * ((size - size / target) / gaps)
    if mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / target
        return 0.5 * delta + i * delta
    return (i + 0.5) * (size / target) - 0.5  # UNALIGN_CORNERS
