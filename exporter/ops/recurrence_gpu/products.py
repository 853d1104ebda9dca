# ruff: noqa: SIM300
# Triton compares and branches on constants only as written here: T to the left, statements rather than expressions.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Products of matrices with more bits than tensor cores take, by splitting the factors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def get(base, inside):
    """Loads what is inside, and 0 for the rest."""
    return tl.load(base, mask=inside, other=0.0)


@triton.jit
def tf32(x):
    """The matrix x rounded to the 11 significant bits of TF32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def wide_dot(a, b, SPLIT_A: tl.constexpr, SPLIT_B: tl.constexpr):
    """Product a @ b of float32 matrices with float32's accuracy. A factor of few enough bits need not be split."""
    high_a = a
    high_b = b
    if SPLIT_A:
        high_a = tf32(a)
    if SPLIT_B:
        high_b = tf32(b)
    result = tl.dot(high_a, high_b, input_precision="tf32")
    if SPLIT_A:
        result = tl.dot(tf32(a - high_a), high_b, result, input_precision="tf32")
    if SPLIT_B:
        result = tl.dot(high_a, tf32(b - high_b), result, input_precision="tf32")
    return result


@triton.jit
def exact_dot(a, b, T: tl.constexpr):
    """Product a @ b of matrices in T, whose products of two numbers are exact."""
    if T == tl.float32:
        result = wide_dot(a, b, True, True)
    elif T == tl.float8e4nv:
        result = tl.dot(a, b, max_num_imprecise_acc=32)
    else:
        result = tl.dot(a, b)
    return result


@triton.jit
def halves(x, AXIS: tl.constexpr, T: tl.constexpr):
    """Splits x into the sum of two numbers in T, and by which powers of two along the axis both were
    divided to stay within float16's range.
    """
    scale = tl.full((1, 1), 1.0, tl.float32)
    if T == tl.float16:
        peak = tl.maximum(tl.max(tl.abs(x), AXIS, keep_dims=True), 1e-30)
        scale = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        x = x / scale
    high = x.to(T)
    return high, (x - high.to(tl.float32)).to(T), scale


@triton.jit
def left_dot(a, b, T: tl.constexpr):
    """Product a @ b, a in T, b in float32."""
    if T == tl.float32:
        result = wide_dot(a, b, True, True)
    else:
        high, low, scale = halves(b, 0, T)
        result = tl.dot(a, low, tl.dot(a, high)) * scale
    return result


@triton.jit
def right_dot(a, b, T: tl.constexpr):
    """Product a @ b, a in float32, b in T."""
    if T == tl.float32:
        result = wide_dot(a, b, True, True)
    else:
        high, low, scale = halves(a, 1, T)
        result = tl.dot(low, b, tl.dot(high, b)) * scale
    return result


@triton.jit
def both_dot(a, b, T: tl.constexpr):
    """Product a @ b, both in float32."""
    if T == tl.float32:
        result = wide_dot(a, b, True, True)
    else:
        high_a, low_a, scale_a = halves(a, 1, T)
        high_b, low_b, scale_b = halves(b, 0, T)
        result = tl.dot(high_a, low_b, tl.dot(low_a, high_b, tl.dot(high_a, high_b))) * scale_a * scale_b
    return result
