"""Compressed weights in the interpreter, by the examples and rules of MIL's documentation."""

import numpy as np

from isthmus.targets.coreml.interpreter import OPERATIONS


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def normal(*shape, seed=0):
    return rng(seed).standard_normal(shape, dtype=np.float32)


def test_weights_in_blocks():
    data = np.int8([[1, 2, 3, 4], [-5, 6, -7, 8]])
    scale, offset = np.float32([[0.5, 2.0]]), np.int8([[1, -1]])
    got = OPERATIONS["constexpr_blockwise_shift_scale"](data=data, scale=scale, offset=offset)
    np.testing.assert_array_equal(got, [[0.0, 0.5, 8.0, 10.0], [-3.0, 2.5, -12.0, 18.0]])
    mask = np.uint8([[1, 0, 0, 1], [0, 1, 1, 0]])
    kept, values = OPERATIONS["constexpr_sparse_blockwise_shift_scale"](data_mask=mask, nonzero_data=data[mask != 0], scale=scale)
    np.testing.assert_array_equal(kept, mask)
    np.testing.assert_array_equal(values, [0.5, 8.0, 3.0, -14.0])


def test_weights_with_a_table():
    indices = np.uint8([[2, 3], [3, 0], [1, 0], [3, 0], [2, 1], [0, 3]])
    lut = np.float32([1, 5, 9, 13, 2, 10, 18, 26]).reshape(2, 1, 4, 1)
    got = OPERATIONS["constexpr_lut_to_dense"](indices=indices, lut=lut)
    np.testing.assert_array_equal(got, [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]])
    vectors = np.float32([[1, 2, 3], [4, 5, 6]]).reshape(1, 1, 2, 3)
    got = OPERATIONS["constexpr_lut_to_dense"](indices=np.uint8([[0, 1]]), lut=vectors, vector_axis=np.int32(0))
    np.testing.assert_array_equal(got, [[1, 4], [2, 5], [3, 6]])
    mask, values = OPERATIONS["constexpr_lut_to_sparse"](
        indices_mask=np.uint8([[1, 0, 1]]), indices_nonzero_data=np.uint8([1, 0]), lut=np.float32([2, 3]).reshape(1, 1, 2, 1)
    )
    np.testing.assert_array_equal(OPERATIONS["constexpr_sparse_to_dense"](nonzero_data=values, mask=mask), [[3, 0, 2]])


def test_weights_of_ios16():
    from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as theirs

    data, scale, zero = rng(8).integers(0, 255, (3, 4), dtype=np.uint8), np.float32([0.1, 0.2, 0.3]), np.uint8([7, 8, 9])
    got = OPERATIONS["constexpr_affine_dequantize"](quantized_data=data, zero_point=zero, scale=scale, axis=np.int32(0))
    np.testing.assert_allclose(got, (data.astype(np.float32) - zero[:, None]) * scale[:, None])
    lut, packed, shape = normal(64), rng(9).integers(0, 255, 9, dtype=np.uint8), np.uint32([3, 4])
    expected = theirs.constexpr_lut_to_dense.decompress(lut, packed, shape)
    np.testing.assert_array_equal(OPERATIONS["constexpr_lut_to_dense"](indices=packed, lut=lut, shape=shape), expected)
    mask = np.packbits(np.uint8([1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0]), bitorder="little")
    got = OPERATIONS["constexpr_sparse_to_dense"](nonzero_data=np.float32([1, 2, 3, 4]), mask=mask, shape=shape)
    np.testing.assert_array_equal(got, [[1, 0, 0, 2], [3, 0, 0, 0], [0, 4, 0, 0]])
    assert OPERATIONS["constexpr_cast"](source_val=lut, output_dtype="fp32") is lut
