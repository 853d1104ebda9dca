# ruff: noqa: SIM300
# Triton compares and branches on constants only as written here: T to the left, statements rather than expressions.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""The outputs of each chunk, from the state before it and from the products inside it."""

from __future__ import annotations

import triton
import triton.language as tl

from .decays import decays_of, sums
from .pairs import pair_products
from .products import both_dot, get, left_dot, right_dot


@triton.jit
def chunk_outputs(
    q,
    k,
    v,
    given_products,
    solved_products,
    solutions,
    decay,
    states,
    y,
    scale,
    length,
    chunks,
    heads,
    repeats,
    key,
    value,
    gated,
    SCALED: tl.constexpr,
    GIVEN: tl.constexpr,
    SOLVED: tl.constexpr,
    DECAY: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """The outputs y of each chunk. Grid: (chunks, batch * heads of q, blocks of value).

    GIVEN: k and v are written to the state as they are. SOLVED: the solutions are, by k, or, if both, by keys of their own. With a decay a
    key channel both products of queries and keys come from `chunk_products`. SCALED: y is multiplied by scale, 0 standing for
    1 / sqrt(key). `repeats` heads of q share a state.
    """
    T: tl.constexpr = q.dtype.element_ty
    W: tl.constexpr = tl.float16 if T == tl.float8e4nv else T
    chunk = tl.program_id(0)
    query_heads = heads * repeats
    query_head = tl.program_id(1) % query_heads
    head = query_head // repeats
    batch = (tl.program_id(1) // query_heads).to(tl.int64)
    series = batch * heads + head
    token = batch * length + chunk * C
    limit = tl.minimum(length - chunk * C, C)
    i = tl.arange(0, C)
    rows = (i < limit)[:, None]
    value_columns = tl.program_id(2) * BV + tl.arange(0, BV)
    in_value = (value_columns < value)[None, :]
    g, g_stride = decays_of(decay, token, heads, head, key, DECAY)
    q_base = q + (token * query_heads + query_head) * key
    q_stride = query_heads * key
    offset = (token * heads + head) * key
    state = states + (series * chunks + chunk) * key * value
    result = tl.zeros((C, BV), tl.float32)
    for start in range(0, key, BK):
        columns = start + tl.arange(0, BK)
        q_rows = get(q_base + (i[:, None] * q_stride + columns[None, :]), rows & (columns < key)[None, :])
        carried = get(state + (columns[:, None] * value + value_columns[None, :]), (columns < key)[:, None] & in_value)
        if DECAY == 2:
            decayed = q_rows.to(tl.float32) * tl.exp(sums(g, g_stride, 0, i, columns, limit, key, False, DECAY))
            result += both_dot(decayed, carried, W)
        else:
            result += left_dot(q_rows.to(W), carried, W)
    if DECAY == 1:
        result *= tl.exp(sums(g, g_stride, 0, i, i, limit * gated, key, False, DECAY))
    stride = heads * key
    square = (tl.program_id(1).to(tl.int64) * chunks + chunk) * (C * C) + (i[:, None] * C + i[None, :])
    if GIVEN:
        if DECAY == 2:
            weights = tl.load(given_products + square)
        else:
            weights = pair_products(q_base, q_stride, k + offset, stride, g, g_stride, key, limit, gated, False, False, DECAY, T, C, BK)
        v_rows = get(v + (token * heads + head) * value + (i[:, None] * (heads * value) + value_columns[None, :]), rows & in_value)
        result += right_dot(weights, v_rows.to(W), W)
    if SOLVED:
        if DECAY == 2:
            weights = tl.load(solved_products + square)
        else:
            weights = pair_products(q_base, q_stride, k + offset, stride, g, g_stride, key, limit, gated, False, False, DECAY, T, C, BK)
        u_rows = get(solutions + (series * length + chunk * C) * value + (i[:, None] * value + value_columns[None, :]), rows & in_value)
        result += both_dot(weights, u_rows, W)
    if SCALED:
        result *= tl.where(scale != 0.0, scale, 1.0 / tl.sqrt(key.to(tl.float32)))
    to = y + (token * query_heads + query_head) * value + (i[:, None] * (query_heads * value) + value_columns[None, :])
    tl.store(to, result.to(y.dtype.element_ty), mask=rows & in_value)
