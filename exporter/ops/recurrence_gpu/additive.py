# ruff: noqa: SIM300
# Triton compares and branches on constants only as written here: T to the left, statements rather than expressions.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Without removal: what each chunk adds to the state, and the state before each chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from .decays import decays_of, sums, total
from .products import exact_dot, get, wide_dot


@triton.jit
def chunk_states(
    k,
    v,
    decay,
    states,
    totals,
    length,
    chunks,
    heads,
    key,
    value,
    DECAY: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """What each chunk adds to the state, states (batch, heads, chunks, key, value), and exp of its
    decay, totals (batch, heads, chunks, key).

    Grid: (chunks, batch * heads, blocks of key * blocks of value).
    """
    T: tl.constexpr = k.dtype.element_ty
    W: tl.constexpr = tl.float16 if T == tl.float8e4nv else T
    chunk = tl.program_id(0)
    series = tl.program_id(1)
    value_block = tl.program_id(2) % tl.cdiv(value, BV)
    columns = tl.program_id(2) // tl.cdiv(value, BV) * BK + tl.arange(0, BK)
    value_columns = value_block * BV + tl.arange(0, BV)
    head = series % heads
    token = (series // heads).to(tl.int64) * length + chunk * C
    limit = tl.minimum(length - chunk * C, C)
    i = tl.arange(0, C)
    rows = (i < limit)[:, None]
    k_at = (token * heads + head) * key + i[:, None] * (heads * key) + columns[None, :]
    v_at = (token * heads + head) * value + i[:, None] * (heads * value) + value_columns[None, :]
    k_rows = get(k + k_at, rows & (columns < key)[None, :])
    v_rows = get(v + v_at, rows & (value_columns < value)[None, :])
    place = series.to(tl.int64) * chunks + chunk
    if DECAY == 0:
        added = exact_dot(tl.trans(k_rows.to(W)), v_rows.to(W), W)
    else:
        g, stride = decays_of(decay, token, heads, head, key, DECAY)
        remains = tl.exp(sums(g, stride, 1, i, columns, limit, key, True, DECAY))
        added = wide_dot(tl.trans(k_rows.to(tl.float32) * remains), v_rows.to(tl.float32), True, T == tl.float32)
        if value_block == 0:
            tl.store(totals + place * key + columns, total(g, stride, i, columns, limit, key, DECAY, BK), mask=columns < key)
    inside = (columns < key)[:, None] & (value_columns < value)[None, :]
    tl.store(states + place * key * value + (columns[:, None] * value + value_columns[None, :]), added, mask=inside)


@triton.jit
def carry_states(states, totals, initial_state, last_state, chunks, key, value, gated, B: tl.constexpr):
    """Replaces what each chunk adds by the state before it, and writes the last one. Grid: (blocks of key * value, batch * heads)."""
    series = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * B + tl.arange(0, B)
    size = key * value
    inside = i < size
    state = get(initial_state + series * size + i, inside)
    here = states + series * chunks * size + i
    factors = totals + series * chunks * key + i // value
    # The next chunk is read before this one is written, so that the loads of one step overlap with the stores of the one before.
    added = get(here, inside)
    for chunk in range(chunks):
        ahead = get(here + size, inside & (chunk + 1 < chunks))
        tl.store(here, state, mask=inside)
        state = state * tl.load(factors, mask=inside & (gated != 0), other=1.0) + added
        added = ahead
        factors += key
        here += size
    tl.store(last_state + series * size + i, state, mask=inside)
