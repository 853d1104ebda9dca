"""Tensors that are made: coremltools drops their `dtype`, and takes that of the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder
from torch import Tensor

from . import decomposition, lowering

aten = torch.ops.aten
mb: Any = Builder


@lowering(aten.scalar_tensor.default)
def scalar_tensor(value: Any, *, dtype: int | None = None) -> Any:
    """One number of a type. A name of coremltools' stands for it: 6 is float32."""
    from coremltools.converters.mil.frontend.torch.utils import NUM_TO_NUMPY_DTYPE

    if not isinstance(value, int | float):
        return NotImplemented
    return mb.const(val=np.asarray(value, np.float32 if dtype is None else NUM_TO_NUMPY_DTYPE[dtype])[()])


def _typed(operator: Any, natural: Callable[..., torch.dtype]) -> None:
    def apply(*arguments: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
        kind = natural(*arguments)
        if dtype is None or dtype == kind:
            return NotImplemented
        return operator(*arguments, dtype=kind).to(dtype)

    apply.__doc__ = "See the module's text."
    decomposition(operator)(apply)


def _of_numbers(*numbers: Any) -> torch.dtype:
    return torch.float32 if any(isinstance(n, float) for n in numbers) else torch.int64


def _single(*arguments: Any) -> torch.dtype:  # noqa: ARG001 - whatever they are
    return torch.float32


def _same(x: Tensor, *arguments: Any) -> torch.dtype:  # noqa: ARG001 - as ATen's
    return x.dtype


for _overload in ("default", "start", "start_step"):
    _typed(getattr(aten.arange, _overload), _of_numbers)
for _operator in (aten.zeros.default, aten.ones.default, aten.eye.default, aten.eye.m, aten.linspace.default):
    _typed(_operator, _single)
for _operator in (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default):
    _typed(_operator, _same)


@decomposition(aten.full.default)
def full(size: Sequence[int], value: Any, *, dtype: Any = None, **_: Any) -> Any:
    """As coremltools fails for no axes."""
    kind = dtype or (torch.bool if isinstance(value, bool) else _of_numbers(value))
    return NotImplemented if len(size) else torch.scalar_tensor(value, dtype=kind)


@decomposition(aten.new_full.default)
def new_full(x: Tensor, size: Sequence[int], value: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    """As coremltools fails for no axes."""
    return torch.full(list(size), value, dtype=dtype or x.dtype)


@decomposition(aten.new_ones.default)
def new_ones(x: Tensor, size: Sequence[int], *, dtype: Any = None, **_: Any) -> Tensor:
    """As coremltools has none."""
    return torch.full(list(size), 1, dtype=dtype or x.dtype)


@decomposition(aten.new_zeros.default, aten.new_empty.default)
def new_zeros(x: Tensor, size: Sequence[int], *, dtype: Any = None, **_: Any) -> Tensor:
    """As coremltools drops `dtype`."""
    return torch.full(list(size), 0, dtype=dtype or x.dtype)


@decomposition(aten.zero.default)
def zero(x: Tensor) -> Tensor:
    """What `zero_` leaves."""
    return torch.zeros_like(x)


@decomposition(aten.where.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther)
def where(condition: Tensor, x: Any, y: Any) -> Tensor:
    """As coremltools lacks overloads with numbers, and mixes the types of the two."""
    dtype = torch.result_type(x, y)
    return torch.where(condition, _operand(x, dtype), _operand(y, dtype))


@decomposition(aten.where.self)
def where_tensors(condition: Tensor, x: Tensor, y: Tensor) -> Any:
    """As coremltools mixes the types of the two, and fails where all three are single numbers."""
    dtype = torch.result_type(x, y)
    if condition.dim() == x.dim() == y.dim() == 0:
        return torch.where(condition.reshape(1), x.to(dtype).reshape(1), y.to(dtype).reshape(1)).reshape(())
    if x.dtype == y.dtype:
        return NotImplemented
    return torch.where(condition, x.to(dtype), y.to(dtype))


def _operand(x: Any, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if isinstance(x, Tensor) else torch.scalar_tensor(x, dtype=dtype)


@lowering(aten.tril_indices.default)
def tril_indices(row: int, col: int, offset: int = 0, **_: Any) -> Any:
    """A constant."""
    return mb.const(val=np.stack(np.tril_indices(row, offset, col)).astype(np.int32))


@lowering(aten.triu_indices.default)
def triu_indices(row: int, col: int, offset: int = 0, **_: Any) -> Any:
    """A constant."""
    return mb.const(val=np.stack(np.triu_indices(row, offset, col)).astype(np.int32))


@decomposition(aten.logspace.default)
def logspace(start: Any, end: Any, steps: int, base: float = 10.0, *, dtype: Any = None, **_: Any) -> Tensor:
    """Powers."""
    return torch.pow(base, torch.linspace(start, end, steps, dtype=dtype))


@decomposition(aten.hann_window.default)
def hann_window(length: int, *, dtype: Any = None, **_: Any) -> Tensor:
    """Periodic: coremltools wants every argument."""
    return hann_window_of_kind(length, True, dtype=dtype)


@decomposition(aten.hann_window.periodic)
def hann_window_of_kind(length: int, periodic: bool, *, dtype: Any = None, **_: Any) -> Tensor:
    """Half a cosine from 0 to 0."""
    angle = torch.arange(length) * (2.0 * torch.pi / (length if periodic else length - 1))
    return (0.5 - 0.5 * torch.cos(angle)).to(dtype or torch.float32)
