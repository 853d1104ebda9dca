"""Operations that read or write parts of a tensor: slices, gathers, scatters."""

# numpy types the arithmetic of arrays of any dtype as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .registry import Array, flags, integers, operation


def _slices(
    shape: tuple[int, ...], begin: Array, end: Array, stride: Array | None, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> tuple[slice | int, ...]:
    count = len(shape)
    first, last, steps = integers(begin), integers(end), [1] * count if stride is None else integers(stride)
    from_start, to_end, single = (flags(mask, count) for mask in (begin_mask, end_mask, squeeze_mask))
    return tuple(
        first[i] if single[i] else slice(None if from_start[i] else first[i], None if to_end[i] else last[i], steps[i])
        for i in range(count)
    )


@operation("slice_by_index")
def _slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    return x[_slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


@operation("slice_update")
def _slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    y = x.copy()
    y[_slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)] = update
    return y


@operation("slice_by_size")
def _slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    starts = integers(begin)
    stops = [x.shape[i] if count < 0 else starts[i] + count for i, count in enumerate(integers(size))]
    return x[tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))]


def _wrapped(indices: Array, size: int) -> Array:
    """Indices from the front; MIL counts negative ones from the end. Signed, whatever the width of the program's indices is."""
    signed = indices.astype(np.int64)
    return np.where(signed < 0, signed + size, signed)


@operation("gather")
def _gather(
    x: Array,
    indices: Array,
    axis: Array | int = 0,
    batch_dims: Array | int = 0,
    validate_indices: Array | bool = False,  # noqa: ARG001 - numpy validates always
) -> Array:
    a, batch = int(axis) % x.ndim, int(batch_dims)
    picked = _wrapped(indices, x.shape[a])
    if batch == 0:
        return np.take(x, picked, axis=a)
    rows = [np.take(x[i], picked[i], axis=a - batch) for i in np.ndindex(*x.shape[:batch])]
    return np.stack(rows).reshape(*x.shape[:batch], *rows[0].shape)


@operation("gather_along_axis")
def _gather_along_axis(
    x: Array,
    indices: Array,
    axis: Array | int = 0,
    validate_indices: Array | bool = False,  # noqa: ARG001 - as MIL's
) -> Array:
    a = int(axis) % x.ndim
    shape = tuple(indices.shape[i] if i == a else size for i, size in enumerate(x.shape))
    return np.take_along_axis(x, np.broadcast_to(_wrapped(indices, x.shape[a]), shape), axis=a)


@operation("gather_nd")
def _gather_nd(
    x: Array,
    indices: Array,
    batch_dims: Array | int = 0,
    validate_indices: Array | bool = False,  # noqa: ARG001 - as MIL's
) -> Array:
    batch = int(batch_dims)
    sizes = x.shape[batch:]
    picked = tuple(_wrapped(indices[..., i], sizes[i]) for i in range(indices.shape[-1]))
    # The batch axes are counted along with the indices, so that each batch reads its own part.
    tail = (1,) * (picked[0].ndim - batch)
    own = tuple(np.arange(x.shape[i]).reshape([-1 if j == i else 1 for j in range(batch)] + list(tail)) for i in range(batch))
    return x[(*own, *picked)]


_COMBINE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


def _write(data: Array, where: Any, updates: Array, mode: str) -> Array:
    y = data.copy()
    if mode == "update":
        y[where] = updates
    else:
        _COMBINE[mode].at(y, where, updates)  # type: ignore[attr-defined]  # every value of the table is a ufunc
    return y


@operation("scatter")
def _scatter(
    data: Array,
    indices: Array,
    updates: Array,
    axis: Array | int = 0,
    mode: str = "add",
    validate_indices: Array | bool = False,  # noqa: ARG001 - as MIL's
) -> Array:
    a = int(axis) % data.ndim
    return _write(data, (slice(None),) * a + (_wrapped(indices, data.shape[a]),), updates, mode)


@operation("scatter_along_axis")
def _scatter_along_axis(
    data: Array,
    indices: Array,
    updates: Array,
    axis: Array | int = 0,
    mode: str = "add",
    validate_indices: Array | bool = False,  # noqa: ARG001 - as MIL's
) -> Array:
    a = int(axis) % data.ndim
    where = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    where[a] = _wrapped(indices, data.shape[a])
    return _write(data, tuple(where), updates, mode)


@operation("scatter_nd")
def _scatter_nd(
    data: Array,
    indices: Array,
    updates: Array,
    mode: str = "add",
    validate_indices: Array | bool = False,  # noqa: ARG001 - as MIL's
) -> Array:
    where = tuple(_wrapped(indices[..., i], data.shape[i]) for i in range(indices.shape[-1]))
    return _write(data, where, updates, mode)
