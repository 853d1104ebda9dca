"""Operations that move elements and make tensors, without computing."""

from __future__ import annotations

import numpy as np

from .registry import Array, axes_of, integers, operation


@operation("reshape")
def _reshape(x: Array, shape: Array) -> Array:
    # A 0 keeps the size of the same axis, a -1 is what remains.
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(integers(shape))]
    return x.reshape(sizes)


@operation("reshape_like")
def _reshape_like(x: Array, ref_tensors: tuple[Array, ...], begins: Array, ends: Array, end_masks: Array) -> Array:
    sizes: list[int] = []
    for ref, begin, end, whole in zip(ref_tensors, integers(begins), integers(ends), np.asarray(end_masks), strict=True):
        sizes += ref.shape[begin : None if whole else end]
    return x.reshape(sizes)


@operation("transpose")
def _transpose(x: Array, perm: Array) -> Array:
    return x.transpose(integers(perm))


@operation("expand_dims")
def _expand_dims(x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(integers(axes)))


@operation("squeeze")
def _squeeze(x: Array, axes: Array | None = None) -> Array:
    return x.squeeze() if axes is None else x.squeeze(axes_of(axes, x.ndim))


@operation("flatten2d")
def _flatten2d(x: Array, axis: Array | int = 1) -> Array:
    return x.reshape(int(np.prod(x.shape[: int(axis)])), -1)


@operation("concat")
def _concat(values: tuple[Array, ...], axis: Array, interleave: Array | bool = False) -> Array:
    values = tuple(np.atleast_1d(v) for v in values)
    if not interleave:
        return np.concatenate(values, axis=int(axis))
    a = int(axis) % values[0].ndim
    return np.stack(values, axis=a + 1).reshape(*values[0].shape[:a], -1, *values[0].shape[a + 1 :])


@operation("stack")
def _stack(values: tuple[Array, ...], axis: Array) -> Array:
    return np.stack(values, axis=int(axis))


@operation("split")
def _split(x: Array, axis: Array, num_splits: Array | None = None, split_sizes: Array | None = None) -> tuple[Array, ...]:
    if split_sizes is None:
        assert num_splits is not None
        return tuple(np.split(x, int(num_splits), axis=int(axis)))
    return tuple(np.split(x, np.cumsum(integers(split_sizes))[:-1], axis=int(axis)))


@operation("tile")
def _tile(x: Array, reps: Array) -> Array:
    return np.tile(x, integers(reps))


@operation("reverse")
def _reverse(x: Array, axes: Array | None = None) -> Array:
    return np.flip(x, axes_of(axes, x.ndim))


_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


@operation("pad")
def _pad(x: Array, pad: Array, mode: str = "constant", constant_val: Array | float = 0.0) -> Array:
    # The widths are those of the last axes, (before, after) for each.
    given = np.asarray(pad).reshape(-1, 2)
    widths = [(0, 0)] * (x.ndim - len(given)) + [(int(a), int(b)) for a, b in given]
    if mode == "constant":
        return np.pad(x, widths, constant_values=np.asarray(constant_val).astype(x.dtype))
    return np.pad(x, widths, mode=_MODES[mode])  # type: ignore[call-overload,no-any-return]  # untyped


@operation("shape")
def _shape(x: Array) -> Array:
    return np.array(x.shape, np.int32)


@operation("fill")
def _fill(shape: Array, value: Array) -> Array:
    return np.full(integers(shape), value)


@operation("fill_like")
def _fill_like(ref_tensor: Array, value: Array) -> Array:
    return np.full(ref_tensor.shape, value)


@operation("range_1d")
def _range_1d(start: Array, end: Array, step: Array) -> Array:
    return np.arange(start, end, step)


@operation("band_part")
def _band_part(x: Array, lower: Array | int = -1, upper: Array | int = -1) -> Array:
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    keep = np.ones(x.shape[-2:], bool)
    if int(lower) >= 0:
        keep &= rows - columns <= int(lower)
    if int(upper) >= 0:
        keep &= columns - rows <= int(upper)
    return np.where(keep, x, 0)


@operation("one_hot")
def _one_hot(
    indices: Array, one_hot_vector_size: Array, axis: Array | int = -1, on_value: Array | int = 1, off_value: Array | int = 0
) -> Array:
    hot = np.arange(int(one_hot_vector_size)) == indices[..., None]
    return np.moveaxis(np.where(hot, on_value, off_value), -1, int(axis))


@operation("pixel_shuffle")
def _pixel_shuffle(x: Array, upscale_factor: Array) -> Array:
    r = int(upscale_factor)
    n, c, h, w = x.shape
    return x.reshape(n, c // r**2, r, r, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // r**2, h * r, w * r)


@operation("pixel_unshuffle")
def _pixel_unshuffle(x: Array, downscale_factor: Array) -> Array:
    r = int(downscale_factor)
    n, c, h, w = x.shape
    return x.reshape(n, c, h // r, r, w // r, r).transpose(0, 1, 3, 5, 2, 4).reshape(n, c * r**2, h // r, w // r)


@operation("crop")
def _crop(x: Array, crop_height: Array, crop_width: Array) -> Array:
    (top, bottom), (left, right) = integers(crop_height), integers(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@operation("sliding_windows")
def _sliding_windows(x: Array, axis: Array, size: Array, stride: Array | int = 1) -> Array:
    a = int(axis) % x.ndim
    windows = np.lib.stride_tricks.sliding_window_view(x, int(size), axis=a)
    return np.moveaxis(windows, -1, a + 1)[(slice(None),) * a + (slice(None, None, int(stride)),)]
