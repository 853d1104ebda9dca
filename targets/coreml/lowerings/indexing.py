"""Reading and writing by index."""

# Operators of torch.ops have no types.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder
from coremltools.converters.mil.mil import types
from torch import Tensor

from . import decomposition, lowering

aten = torch.ops.aten
mb: Any = Builder


# Reading.


@decomposition(aten.gather.default)
def gather(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:  # noqa: ARG001 - concerns training
    """As coremltools wants the sizes of x and index to be equal beside `dim`; torch takes an index that is smaller."""
    if x.dim() == 0 or index.dim() == 0:
        return torch.gather(x.reshape(-1), 0, index.reshape(-1)).reshape(index.shape)
    axes = _smaller(index, x, dim)
    if not axes:
        return NotImplemented
    for axis in axes:
        x = x.narrow(axis, 0, index.shape[axis])
    return torch.gather(x, dim, index)


@decomposition(aten.take.default)
def take(x: Tensor, index: Tensor) -> Tensor:
    """Elements of the tensor laid out in a row."""
    return torch.index_select(x.reshape(-1), 0, index.reshape(-1)).reshape(index.shape)


@decomposition(aten.one_hot.default)
def one_hot(x: Tensor, num_classes: int = -1) -> Any:
    """As coremltools takes what it computed as a float for no index."""
    if num_classes < 0:
        return NotImplemented
    return (x.unsqueeze(-1) == torch.arange(num_classes)).to(torch.int64)


@decomposition(aten.bucketize.Tensor)
def bucketize(x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    """How many boundaries lie below each number: torch's decomposition searches, with a data-dependent loop."""
    below = boundaries <= x.unsqueeze(-1) if right else boundaries < x.unsqueeze(-1)
    return below.to(torch.int32).sum(-1).to(torch.int32 if out_int32 else torch.int64)


@decomposition(aten.searchsorted.Tensor)
def searchsorted(
    boundaries: Tensor,
    x: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Any:
    """See `bucketize`; rows of boundaries (..., N) go with rows of x (..., M)."""
    if sorter is not None:
        boundaries = torch.gather(boundaries, -1, sorter)
    if boundaries.dim() > 1:
        boundaries = boundaries.unsqueeze(-2)
    return bucketize(x, boundaries, out_int32=out_int32, right=right or side == "right")


# Writing.


@decomposition(aten.index_put.default)
def index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """As coremltools fails for axes before the indices, and for indices that are broadcast. One value where a mask is set is a choice."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for _, index in given):
        mask = indices[0]
        if accumulate or len(indices) != 1 or mask is None or values.numel() != 1:
            return NotImplemented
        mask = mask.reshape([*mask.shape, *[1] * (x.dim() - mask.dim())])
        return torch.where(mask, values.reshape(()).to(x.dtype), x)
    axes = [axis for axis, _ in given]
    shape = torch.broadcast_shapes(*(index.shape for _, index in given))  # type: ignore[no-untyped-call]  # untyped
    whole = values.shape == (*shape, *x.shape[len(axes) :]) and all(index.shape == shape for _, index in given)
    if axes == list(range(len(axes))) and whole:
        return NotImplemented
    if axes != list(range(axes[0], axes[0] + len(axes))):
        return NotImplemented
    before, rank = axes[0], len(shape)
    wide = values.expand([*x.shape[:before], *shape, *x.shape[before + len(axes) :]])
    front = list(range(before, before + rank))
    wide = wide.permute([*front, *(axis for axis in range(wide.dim()) if axis not in front)])
    order = [*axes, *(axis for axis in range(x.dim()) if axis not in axes)]
    written = aten.index_put.default(x.permute(order), [index.expand(shape) for _, index in given], wide.clone(), accumulate)
    return written.permute([order.index(axis) for axis in range(x.dim())])


@decomposition(aten.index_add.default)
def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Tensor:
    """Adds slices."""
    source = source if alpha == 1 else source * alpha
    return aten.index_put.default(x.movedim(dim, 0), [index], source.movedim(dim, 0), True).movedim(0, dim)


@decomposition(aten.index_copy.default)
def index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """Replaces slices."""
    return aten.index_put.default(x.movedim(dim, 0), [index], source.movedim(dim, 0)).movedim(0, dim)


@decomposition(aten.index_fill.int_Scalar)
def index_fill(x: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """Fills slices."""
    shape = [index.shape[0] if axis == dim % x.dim() else size for axis, size in enumerate(x.shape)]
    return index_copy(x, dim, index, torch.full(shape, value, dtype=x.dtype))


@decomposition(aten.put.default)
def put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """Elements of the tensor laid out in a row."""
    return aten.index_put.default(x.reshape(-1), [index.reshape(-1)], source.reshape(-1), accumulate).reshape(x.shape)


@decomposition(aten.masked_scatter.default)
def masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The next number of the source at each place of the mask."""
    mask = mask.expand(x.shape)
    at = mask.reshape(-1).to(torch.int32).cumsum(0) - 1
    taken = torch.index_select(source.reshape(-1), 0, torch.maximum(at, torch.zeros_like(at)))
    return torch.where(mask, taken.reshape(x.shape), x)


@decomposition(aten.diagonal_scatter.default)
def diagonal_scatter(x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """Replaces a diagonal."""
    matrix = x.movedim((dim1, dim2), (-2, -1))
    rows, columns = matrix.shape[-2:]
    at = torch.arange(rows).unsqueeze(1) + offset == torch.arange(columns)
    column = max(offset, 0)  # where the first element stands
    spread = aten.pad.default(source, [column, columns - column - source.shape[-1]]).unsqueeze(-2)
    return torch.where(at, spread, matrix).movedim((-2, -1), (dim1, dim2))


def _scattered(operator: Any) -> None:
    def apply(x: Tensor, dim: int, index: Tensor, source: Any, *rest: Any, **keywords: Any) -> Any:
        if x.dim() == 0:
            return NotImplemented
        axes = _smaller(index, x, dim)
        larger = isinstance(source, Tensor) and source.dim() and tuple(source.shape) != tuple(index.shape)
        if not axes and not larger:
            return NotImplemented
        if larger:
            for axis in range(x.dim()):
                source = source.narrow(axis, 0, index.shape[axis])
        if not axes:
            return operator(x, dim, index, source, *rest, **keywords)
        axis = axes[0]
        kept = index.shape[axis]
        written = operator(x.narrow(axis, 0, kept), dim, index, source, *rest, **keywords)
        return torch.cat([written, x.narrow(axis, kept, x.shape[axis] - kept)], axis)

    apply.__doc__ = "As coremltools wants the sizes of x, index and source to be equal; torch takes an index that is smaller."
    decomposition(operator)(apply)


for _operator in (
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter.reduce,
    aten.scatter.value_reduce,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
):
    _scattered(_operator)

_MODES = {"sum": "add", "mean": "add", "prod": "mul", "amax": "max", "amin": "min"}
_IDENTITIES = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "amax": -math.inf, "amin": math.inf}


@lowering(aten.scatter_reduce.two)
def scatter_reduce(x: Any, dim: int, index: Any, source: Any, reduce: str, *, include_self: bool = True) -> Any:
    """As coremltools has none. Without x itself, the places that are written begin with what changes no result."""
    kind = types.builtin_to_string(x.dtype)
    index = index if types.builtin_to_string(index.dtype) == "int32" else mb.cast(x=index, dtype="int32")

    def scattered(data: Any, updates: Any, mode: str) -> Any:
        return mb.scatter_along_axis(data=data, indices=index, updates=updates, axis=dim, mode=mode)

    def filled(value: float) -> Any:
        return mb.cast(x=mb.fill_like(ref_tensor=source, value=np.float32(value)), dtype=kind)

    start = x if include_self else scattered(x, filled(_IDENTITIES[reduce]), "update")
    result = scattered(start, source, _MODES[reduce])
    if reduce != "mean":
        return result
    ones = mb.cast(x=mb.fill_like(ref_tensor=x, value=np.float32(1.0)), dtype=kind)
    own = ones if include_self else scattered(ones, filled(0.0), "update")
    return mb.real_div(x=result, y=scattered(own, filled(1.0), "add"))


def _smaller(index: Tensor, x: Tensor, dim: int) -> list[int]:
    """The axes, beside `dim`, along which an index is smaller."""
    sizes = zip(index.shape, x.shape, strict=True)
    return [
        axis
        for axis, (size, of) in enumerate(sizes)
        if axis != dim % x.dim() and isinstance(size, int) and isinstance(of, int) and size < of
    ]


# Sampling.


@decomposition(aten.affine_grid_generator.default)
def affine_grid_generator(theta: Tensor, size: Sequence[int], align_corners: bool) -> Any:
    """As coremltools has it before `grid_sample` alone, and with corners aligned. Places (x, y, 1) times the matrices (batch, 2, 3)."""
    height, width = size[-2:]
    if len(size) != 4 or not isinstance(height, int) or not isinstance(width, int):
        return NotImplemented
    x, y = (_line(n, align_corners).to(theta.dtype) for n in (width, height))
    ones = torch.ones([height, width], dtype=theta.dtype)
    places = torch.stack([x.expand(height, width), y.unsqueeze(1).expand(height, width), ones], -1)
    return torch.matmul(places.reshape(1, height * width, 3), theta.mT).reshape(theta.shape[0], height, width, 2)


def _line(size: int, align_corners: bool) -> Tensor:
    """From -1 to 1: the middles of the first and last pixel, or their edges."""
    if align_corners:
        return torch.arange(size) * (2.0 / (size - 1)) - 1.0 if size > 1 else torch.zeros([1])
    return (torch.arange(size) * 2.0 + 1.0) / size - 1.0
