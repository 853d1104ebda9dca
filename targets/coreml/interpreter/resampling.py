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


@operation("resample")
def _resample(
    x: Array,
    coordinates: Array,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Array | float,
    coordinates_mode: str,
    align_corners: Array | bool,
) -> Array:
    """Batch by batch, at places (x, y) of the last axis of `coordinates` (batch, height, width, 2)."""
    columns, rows = (
        _folded(_unnormalized(coordinates[..., i], size, coordinates_mode, bool(align_corners)), size, padding_mode)
        for i, size in ((0, x.shape[3]), (1, x.shape[2]))
    )
    if sampling_mode == "nearest":
        return _at(x, np.round(rows), np.round(columns), padding_value)
    top, left = np.floor(rows), np.floor(columns)
    down, right = (rows - top)[:, None], (columns - left)[:, None]
    upper = _at(x, top, left, padding_value) * (1 - right) + _at(x, top, left + 1, padding_value) * right
    lower = _at(x, top + 1, left, padding_value) * (1 - right) + _at(x, top + 1, left + 1, padding_value) * right
    return (upper * (1 - down) + lower * down).astype(np.float32)


def _unnormalized(places: Array, size: int, mode: str, align_corners: bool) -> Array:
    """Places counted in pixels, the middle of the first one being 0."""
    places = places.astype(np.float64)
    if mode == "unnormalized":
        return places
    share = (places + 1) / 2 if mode == "normalized_minus_one_to_one" else places
    return share * (size - 1) if align_corners else share * size - 0.5


def _folded(places: Array, size: int, mode: str) -> Array:
    """Places brought into the image, where the mode does so."""
    if mode == "border":
        return np.clip(places, 0, size - 1)
    if mode not in ("reflection", "symmetric"):
        return places
    # `reflection` turns at the middle of the last pixel, `symmetric` at its edge.
    first, span = (0.0, size - 1.0) if mode == "reflection" else (-0.5, float(size))
    if not span:
        return np.zeros_like(places)
    folded = np.abs(np.mod(places - first + span, 2 * span) - span)
    return np.clip(folded + first, 0, size - 1)


def _at(x: Array, rows: Array, columns: Array, outside: Array | float) -> Array:
    """x[b, :, rows[b], columns[b]], and `outside` where that is none of the image's."""
    inside = (rows >= 0) & (rows < x.shape[2]) & (columns >= 0) & (columns < x.shape[3])
    rows, columns = (np.clip(p, 0, n - 1).astype(np.int64) for p, n in ((rows, x.shape[2]), (columns, x.shape[3])))
    batch = np.arange(x.shape[0])[:, None, None]
    return np.where(inside[:, None], np.moveaxis(x[batch, :, rows, columns], -1, 1), outside)
