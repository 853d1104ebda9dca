"""What Triton 3.7's interpreter computes otherwise than a GPU, and what makes it slow, put right for the time of a call.

Values:

- `tl.dot` multiplies bfloat16 bit patterns as integers (triton-lang/triton#11584, closed as not supported);
- conversions to bfloat16 and FP8 round half up, and lose the carry into an odd exponent (`_convert_float` ORs it in), so that 1.999 becomes
  1; the hardware rounds to even, and saturates FP8;
- `tl.dot` of float32 with `input_precision="tf32"` is exact, where tensor cores read 10 bits of mantissa.

Speed: the types of tensors are built anew, with their names, for every operation; and 32-bit integer arithmetic is done again in 64 bits to
find overflows, which the launch's own checks exclude. What replaces them gives the same values.

Drop each when the interpreter of the installed version does it: `tests/exporter/ops/test_gpu.py` holds the values.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_FLOATS = {
    tl.float16: np.dtype(np.float16),
    tl.float32: np.dtype(np.float32),
    tl.float64: np.dtype(np.float64),
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.float8e5: np.dtype(ml_dtypes.float8_e5m2),
}

Array = np.ndarray[Any, Any]


def _convert(x: Array, source: Any, to: Any, rounding: Any) -> Array:
    """The bits of x in another floating type. Every use in our kernels rounds to even."""
    values = _floats(x, source)
    if to.is_fp8():
        limit = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}[to]
        values = np.clip(values, -limit, limit)  # a NaN stays one
    return values.astype(_FLOATS[to]).view(f"uint{to.primitive_bitwidth}")


def _floats(x: Array, dtype: Any) -> Array:
    """Values from how the interpreter stores them: bfloat16 and FP8 as unsigned integers."""
    return np.ascontiguousarray(x).view(_FLOATS[dtype])


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    if not a.dtype.is_floating():
        return interpreter.TensorHandle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)
    x, y = (_floats(side.data, side.dtype).astype(np.float32) for side in (a, b))
    if a.dtype.is_fp32() and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
        x, y = ((side.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for side in (x, y))
    return interpreter.TensorHandle((np.matmul(x, y) + d.data).astype(d.data.dtype), d.dtype.scalar)


@functools.cache
def _block(element: Any, sizes: tuple[int, ...]) -> dict[str, Any]:
    """The attributes of a block type."""
    block = object.__new__(tl.block_type)
    _INIT(block, element, list(sizes))
    return {**vars(block), "sizes": sizes, "constants": tl.tuple([tl.constexpr(s) for s in sizes]), "count": tl.constexpr(math.prod(sizes))}


def _init_block(self: Any, element_ty: Any, shape: Any) -> None:
    vars(self).update(_block(element_ty, tuple(s.value if isinstance(s, tl.constexpr) else s for s in shape)))


def _same_block(self: Any, other: Any) -> bool:
    return isinstance(other, tl.block_type) and self.sizes == other.sizes and self.element_ty == other.element_ty


_NO_SHAPE, _ONE = tl.tuple([]), tl.constexpr(1)
_INIT = tl.block_type.__init__


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = (type.constants, type.count) if isinstance(type, tl.block_type) else (_NO_SHAPE, _ONE)


def _broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    if not (isinstance(lhs.type, tl.block_type) and isinstance(rhs.type, tl.block_type)) or len(lhs.type.sizes) != len(rhs.type.sizes):
        return _BROADCAST(self, lhs, rhs)  # type: ignore[no-any-return]  # untyped
    if lhs.type.sizes == rhs.type.sizes:
        return lhs, rhs
    shape = np.broadcast_shapes(lhs.type.sizes, rhs.type.sizes)
    return _spread(lhs, shape), _spread(rhs, shape)


def _spread(x: Any, shape: tuple[int, ...]) -> Any:
    if x.type.sizes == shape:
        return x
    handle = interpreter.TensorHandle(np.broadcast_to(x.handle.data, shape), x.handle.dtype)
    return tl.tensor(handle, tl.block_type(x.type.element_ty, shape))


_BROADCAST = TritonSemantic.broadcast_impl_value
_DTYPE = functools.cache(interpreter._get_np_dtype)


def _numpy(dtype: Any) -> Any:
    if isinstance(dtype, tl.block_type):
        dtype = dtype.element_ty
    return np.dtype(np.uint64) if isinstance(dtype, tl.pointer_type) else _DTYPE(dtype)


_FIXES = (
    (interpreter, "_convert_float", _convert),
    (interpreter, "_get_np_dtype", _numpy),
    (interpreter.InterpreterBuilder, "create_dot", _dot),
    (interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)),
    (tl.pointer_type, "__hash__", tl.dtype.__hash__),
    (tl.block_type, "__init__", _init_block),
    (tl.block_type, "__eq__", _same_block),
    (tl.tensor, "__init__", _init_tensor),
    (TritonSemantic, "broadcast_impl_value", _broadcast),
)


@contextlib.contextmanager
def fixed() -> Iterator[None]:
    """Puts the interpreter right, and back."""
    before = [(place, name, getattr(place, name)) for place, name, _ in _FIXES]
    try:
        for place, name, value in _FIXES:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
