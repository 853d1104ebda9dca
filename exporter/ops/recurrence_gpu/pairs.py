# Triton compares and branches on constants only as written here: T to the left, statements rather than expressions.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Products of the tokens of a chunk with each other, decayed by what lies between them."""

from __future__ import annotations

import triton
import triton.language as tl

from .decays import decays_of
from .products import exact_dot, get, wide_dot


@triton.jit
def pair_products(
    x,
    x_stride,
    y,
    stride,
    decay,
    decay_stride,
    key,
    limit,
    gated,
    BEFORE: tl.constexpr,
    STRICT: tl.constexpr,
    DECAY: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
):
    """x_t . exp(G) y_s for s <= t, or s < t if STRICT, else 0, (C, C), with float32's accuracy; G sums the decays after s up to t, or up to
    t - 1 if BEFORE.

    With a decay per key channel, the pairs (t, s) are divided by the largest power of two that separates them: for each such size, t lies
    in an odd block and s in the even one before it, x is scaled by the decays from the start of t's block and y by those to the end of
    s's, and one product of matrices gives all pairs of that size.
    """
    i = tl.arange(0, C)
    rows = (i < limit)[:, None]
    result = tl.zeros((C, C), tl.float32)
    # Of t and s, the highest bit that differs.
    apart = i[:, None] ^ i[None, :]
    allowed = i[:, None] >= i[None, :]
    earlier = i[:, None] > i[None, :]
    later = i[:, None] < i[None, :]
    for start in tl.range(0, key, BK, disable_licm=True):
        columns = start + tl.arange(0, BK)
        inside = rows & (columns < key)[None, :]
        x_rows = get(x + (i[:, None] * x_stride + columns[None, :]), inside)
        y_rows = get(y + (i[:, None] * stride + columns[None, :]), inside)
        if DECAY != 2:
            result += exact_dot(x_rows, tl.trans(y_rows), T)
        else:
            x_rows = x_rows.to(tl.float32)
            y_rows = y_rows.to(tl.float32)
            # Sums of decays are products with zeros and ones, which infinity would spoil; exp of the limit is 0.
            g = get(decay + (i[:, None] * decay_stride + columns[None, :]), inside).to(tl.float32)
            g = tl.maximum(g, -1e4)
            for level in tl.range(0, 6, disable_licm=True):
                distance = apart >> level
                upto = (distance == 0) & allowed
                if BEFORE:
                    upto = (distance == 0) & earlier
                since = wide_dot(tl.where(upto, 1.0, 0.0), g, False, True)
                left = wide_dot(tl.where((distance == 0) & later, 1.0, 0.0), g, False, True)
                scaled = x_rows * tl.exp(since)
                result += tl.where(distance == 1, wide_dot(scaled, tl.trans(y_rows * tl.exp(left)), True, True), 0.0)
            if not STRICT:
                result += tl.where(apart == 0, tl.sum(x_rows * y_rows, 1)[:, None], 0.0)
    if DECAY == 1:
        g = get(decay + i * decay_stride, i < limit * gated).to(tl.float32)
        factor = tl.exp(tl.cumsum(tl.where(earlier, g[:, None], 0.0), 0))
        result *= factor
    if STRICT:
        allowed = earlier
    return tl.where(allowed, result, 0.0)


@triton.jit
def chunk_products(
    x,
    y,
    decay,
    products,
    length,
    chunks,
    heads,
    repeats,
    key,
    BEFORE: tl.constexpr,
    STRICT: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
):
    """The decayed products inside each chunk, with a decay a key channel: products (batch, heads * repeats, chunks, C, C).

    x has heads * repeats heads, y and the decay have `heads`. Grid: (chunks, batch * heads * repeats).

    A kernel apart, because every block of values needs them, and two kinds of them in one kernel do not fit the registers.
    """
    T: tl.constexpr = x.dtype.element_ty
    chunk = tl.program_id(0)
    series = tl.program_id(1)
    x_heads = heads * repeats
    x_head = series % x_heads
    head = x_head // repeats
    token = (series // x_heads).to(tl.int64) * length + chunk * C
    limit = tl.minimum(length - chunk * C, C)
    g, g_stride = decays_of(decay, token, heads, head, key, 2)
    i = tl.arange(0, C)
    x_at = x + (token * x_heads + x_head) * key
    y_at = y + (token * heads + head) * key
    found = pair_products(x_at, x_heads * key, y_at, heads * key, g, g_stride, key, limit, 1, BEFORE, STRICT, 2, T, C, BK)
    tl.store(products + (series.to(tl.int64) * chunks + chunk) * (C * C) + (i[:, None] * C + i[None, :]), found)
