"""Convolutions and pooling, over (batch, channels, *space) with one to three axes of space."""

# numpy types the arithmetic of arrays of any dtype as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .registry import Array, integers, operation


def _or_ones(values: Array | None, count: int) -> list[int]:
    return [1] * count if values is None else integers(values)


def _padding(pad_type: str, pad: Array | None, sizes: tuple[int, ...], spans: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """(before, after) of each axis; a span is what a kernel covers, dilation included."""
    if pad_type == "custom":
        widths = integers(pad)
        return list(zip(widths[::2], widths[1::2], strict=True))
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    totals = [max(0, (math.ceil(n / s) - 1) * s + k - n) for n, k, s in zip(sizes, spans, strides, strict=True)]
    halves = [(t // 2, t - t // 2) for t in totals]
    return halves if pad_type == "same" else [(b, a) for a, b in halves]


def _taps(x: Array, kernel: tuple[int, ...], strides: list[int], dilations: list[int]) -> Iterator[tuple[tuple[int, ...], Array]]:
    """For each element of the kernel, what it meets at every place of the output."""
    outputs = [(n - (k - 1) * d - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)]
    for tap in np.ndindex(*kernel):
        starts = [t * d for t, d in zip(tap, dilations, strict=True)]
        where: Any = (..., *(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(starts, outputs, strides, strict=True)))
        yield tap, x[where]


def _at(weight: Array, tap: tuple[int, ...]) -> Array:
    """The matrix of one element of the kernel."""
    where: Any = (..., *tap)
    return weight[where]


@operation("conv")
def _conv(
    x: Array,
    weight: Array,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: Array | int = 1,
    bias: Array | None = None,
) -> Array:
    kernel, space, g = weight.shape[2:], x.ndim - 2, int(groups)
    step, dilation = _or_ones(strides, space), _or_ones(dilations, space)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    x = np.pad(x, [(0, 0), (0, 0), *_padding(pad_type, pad, x.shape[2:], spans, step)])
    weight = weight.reshape(g, weight.shape[0] // g, weight.shape[1], *kernel)
    total: Array | None = None
    shape: tuple[int, ...] = ()
    for tap, met in _taps(x, kernel, step, dilation):
        shape = met.shape
        term = _at(weight, tap) @ met.reshape(shape[0], g, shape[1] // g, -1)
        total = term if total is None else total + term
    assert total is not None
    y = total.reshape(shape[0], -1, *shape[2:])
    return y if bias is None else y + bias.reshape(-1, *[1] * space)


@operation("conv_transpose")
def _conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    pad: Array | None = None,
    output_shape: Array | None = None,
    pad_type: str = "valid",
    strides: Array | None = None,
    dilations: Array | None = None,
    groups: Array | int = 1,
) -> Array:
    kernel, space, g = weight.shape[2:], x.ndim - 2, int(groups)
    step, dilation = _or_ones(strides, space), _or_ones(dilations, space)
    batch, channels, *sizes = x.shape
    full = [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(sizes, kernel, step, dilation, strict=True)]
    y = np.zeros((batch, g * weight.shape[1], *full), x.dtype)
    # (groups, out, in) matrices, one for each element of the kernel
    matrices = np.swapaxes(weight.reshape(g, channels // g, weight.shape[1], *kernel), 1, 2)
    for tap, met in _taps(y, kernel, step, dilation):
        met[...] = met + (_at(matrices, tap) @ x.reshape(batch, g, channels // g, -1)).reshape(met.shape)
    wanted = full if output_shape is None else integers(output_shape)[2:]
    crop = list(zip(integers(pad)[::2], integers(pad)[1::2], strict=True)) if pad_type == "custom" else [(0, 0)] * space
    if pad_type in ("same", "same_lower"):
        excess = [n - (w if output_shape is not None else m * s) for n, w, m, s in zip(full, wanted, sizes, step, strict=True)]
        crop = [(e // 2, e - e // 2) if pad_type == "same" else (e - e // 2, e // 2) for e in excess]
    if output_shape is not None and pad_type not in ("same", "same_lower"):
        # What the padding does not account for is cut, or added, at the end.
        crop = [(a, n - a - w) for (a, _), n, w in zip(crop, full, wanted, strict=True)]
    y = np.pad(y, [(0, 0), (0, 0), *((0, max(0, -b)) for _, b in crop)])
    kept: Any = (..., *(slice(a, y.shape[i + 2] - max(b, 0)) for i, (a, b) in enumerate(crop)))
    y = y[kept]
    return y if bias is None else y + bias.reshape(-1, *[1] * space)


def _pooled(
    x: Array, kernel_sizes: Array, strides: Array | None, pad_type: str, pad: Array | None, ceil_mode: Array | bool, fill: float
) -> list[Array]:
    kernel, step = integers(kernel_sizes), _or_ones(strides, x.ndim - 2)
    widths = _padding(pad_type, pad, x.shape[2:], kernel, step)
    if ceil_mode:
        # The last window may hang over the end, if it begins inside the input or its left padding.
        for i, ((a, b), n, k, s) in enumerate(zip(widths, x.shape[2:], kernel, step, strict=True)):
            count = math.ceil((n + a + b - k) / s) + 1
            count -= (count - 1) * s >= n + a
            widths[i] = (a, b + max(0, (count - 1) * s + k - (n + a + b)))
    x = np.pad(x, [(0, 0), (0, 0), *widths], constant_values=fill)
    return [met for _, met in _taps(x, tuple(kernel), step, [1] * len(kernel))]


@operation("max_pool")
def _max_pool(
    x: Array,
    kernel_sizes: Array,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    ceil_mode: Array | bool = False,
) -> Array:
    return np.max(_pooled(x, kernel_sizes, strides, pad_type, pad, ceil_mode, -np.inf), axis=0)


@operation("avg_pool")
def _avg_pool(
    x: Array,
    kernel_sizes: Array,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    exclude_padding_from_average: Array | bool = False,
    ceil_mode: Array | bool = False,
) -> Array:
    how = (kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    sums = np.sum(_pooled(x, *how), axis=0)
    count: Array | int = math.prod(integers(kernel_sizes))
    if exclude_padding_from_average:
        count = np.sum(_pooled(np.ones_like(x), *how), axis=0)
    return sums / count


@operation("l2_pool")
def _l2_pool(
    x: Array,
    kernel_sizes: Array,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    ceil_mode: Array | bool = False,
) -> Array:
    return np.sqrt(np.sum(_pooled(x * x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0), axis=0))
