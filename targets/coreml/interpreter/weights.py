"""Compressed weights (`constexpr_*`, of iOS 16 and of iOS 18) and quantised activations."""

# numpy types the arithmetic of arrays of any dtype as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import numpy as np

from .registry import Array, along, integers, operation


def _blown_up(values: Array, shape: tuple[int, ...]) -> Array:
    """Each value repeated over its block, so that the result has the shape."""
    for axis, (few, many) in enumerate(zip(values.shape, shape, strict=True)):
        values = np.repeat(values, many // few, axis=axis)
    return values


def _bits(packed: Array, width: int, count: int) -> Array:
    """Unsigned numbers of `width` bits, packed from the least significant bit on."""
    bits = np.unpackbits(packed, bitorder="little")[: width * count].reshape(count, width)
    return (bits.astype(np.int64) << np.arange(width)).sum(axis=1)


@operation("constexpr_blockwise_shift_scale")
def _blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    values = data.astype(np.float32)
    if offset is not None:
        values = values - _blown_up(offset.astype(np.float32), data.shape)
    return values * _blown_up(scale, data.shape)


@operation("constexpr_affine_dequantize")
def _affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    return _dequantize(quantized_data, scale, zero_point, axis)


@operation("constexpr_lut_to_dense")
def _lut_to_dense(indices: Array, lut: Array, vector_axis: Array | None = None, shape: Array | None = None) -> Array:
    if shape is not None:  # iOS 16: packed indices and one table
        count = int(np.prod(integers(shape)))
        return lut[_bits(indices, int(np.log2(lut.size)), count)].reshape(integers(shape))
    tables = lut.shape[: indices.ndim]
    where = [np.arange(n) // (n // t) for n, t in zip(indices.shape, tables, strict=True)]
    vectors = lut[(*np.ix_(*where), indices.astype(np.int64))]
    if lut.shape[-1] == 1:
        return vectors[..., 0]
    assert vector_axis is not None
    a = int(vector_axis) % indices.ndim
    sizes = [n * (lut.shape[-1] if i == a else 1) for i, n in enumerate(indices.shape)]
    return np.moveaxis(vectors, -1, a + 1).reshape(sizes)


@operation("constexpr_sparse_to_dense")
def _sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    if shape is not None:  # iOS 16: a packed mask
        mask = _bits(mask, 1, int(np.prod(integers(shape)))).reshape(integers(shape))
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


@operation("constexpr_lut_to_sparse")
def _lut_to_sparse(indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None) -> tuple[Array, Array]:
    dense = _lut_to_dense(_sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask if vector_axis is None else np.repeat(indices_mask, lut.shape[-1], axis=int(vector_axis))
    return mask, dense[mask != 0]


@operation("constexpr_sparse_blockwise_shift_scale")
def _sparse_blockwise_shift_scale(data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None) -> tuple[Array, Array]:
    dense = _blockwise_shift_scale(_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


@operation("constexpr_cast")
def _constexpr_cast(source_val: Array, output_dtype: str) -> Array:  # noqa: ARG001 - float16 to float32 is the only one
    return source_val


@operation("quantize")
def _quantize(input: Array, scale: Array, output_dtype: str, zero_point: Array | None = None, axis: Array | int = 0) -> Array:
    scale, zero = _affine(input.ndim, scale, zero_point, axis)
    limits = np.iinfo(output_dtype)
    return np.clip(np.round(input / scale) + zero, limits.min, limits.max).astype(output_dtype)


@operation("dequantize")
def _dequantize_activation(input: Array, scale: Array, zero_point: Array | None = None, axis: Array | int = 0) -> Array:
    return _dequantize(input, scale, zero_point, axis)


def _dequantize(values: Array, scale: Array, zero_point: Array | None, axis: Array | int) -> Array:
    scale, zero = _affine(values.ndim, scale, zero_point, axis)
    return (values.astype(np.float32) - zero) * scale


def _affine(rank: int, scale: Array, zero_point: Array | None, axis: Array | int) -> tuple[Array, Array]:
    zero = np.zeros((), np.float32) if zero_point is None else zero_point.astype(np.float32)
    return along(scale, int(axis), rank) if scale.ndim else scale, along(zero, int(axis), rank) if zero.ndim else zero
