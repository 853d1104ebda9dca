# ruff: noqa: SIM300
# Triton compares and branches on constants only as written here: T to the left, statements rather than expressions.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, assignment"
"""With removal: the triangular system of each chunk, what it makes of the state, and the states before each chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from .decays import decays_of, sums, total
from .pairs import pair_products
from .products import get, wide_dot


@triton.jit
def inverse(a, C: tl.constexpr):
    """(1 - a)^-1 for a strictly lower triangular (C, C): forward substitution in blocks, whose size doubles."""
    i = tl.arange(0, C)
    apart = i[:, None] ^ i[None, :]
    # In blocks of one the inverse is 1, so that the first doubling is an addition.
    found = tl.where(apart == 0, 1.0, tl.where(apart == 1, a, 0.0))
    for level in tl.range(1, 6, disable_licm=True):
        below = tl.where(apart >> level == 1, a, 0.0)
        found += wide_dot(wide_dot(found, below, True, True), found, True, True)
    return found


@triton.jit
def chunk_inverses(
    a,
    b,
    k,
    beta,
    decay,
    inverses,
    mixed,
    length,
    chunks,
    heads,
    key,
    betas,
    gated,
    REMOVAL: tl.constexpr,
    DECAY: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
):
    """The inverse of each chunk's triangular system, inverses (batch, heads, chunks, C, C). Grid: (chunks, batch * heads).

    Without REMOVAL, for the delta rules, u = beta (v - w) is solved for, from k and beta: inverses holds the inverse times beta. With
    REMOVAL, w is, from a and b; mixed, of the same shape, holds the products of a and k, which are multiplied by the inverse.
    """
    T: tl.constexpr = k.dtype.element_ty
    chunk = tl.program_id(0)
    series = tl.program_id(1)
    head = series % heads
    token = (series // heads).to(tl.int64) * length + chunk * C
    limit = tl.minimum(length - chunk * C, C)
    g, g_stride = decays_of(decay, token, heads, head, key, DECAY)
    i = tl.arange(0, C)
    offset = (token * heads + head) * key
    stride = heads * key
    place = (series.to(tl.int64) * chunks + chunk) * (C * C) + (i[:, None] * C + i[None, :])
    if REMOVAL:
        system = pair_products(a + offset, stride, b + offset, stride, g, g_stride, key, limit, gated, True, True, DECAY, T, C, BK)
        solved = inverse(system, C)
        tl.store(inverses + place, solved)
        tl.store(mixed + place, wide_dot(solved, tl.load(mixed + place), True, True))
    else:
        rates = get(beta + token * betas + tl.where(betas > 1, head, 0) + i * betas, i < limit).to(tl.float32)
        keys = k + offset
        system = pair_products(keys, stride, keys, stride, g, g_stride, key, limit, gated, False, True, DECAY, T, C, BK)
        tl.store(inverses + place, inverse(-rates[:, None] * system, C) * rates[None, :])


@triton.jit
def chunk_solutions(
    a,
    b,
    v,
    decay,
    inverses,
    mixed,
    reads,
    solutions,
    writes,
    totals,
    length,
    chunks,
    heads,
    key,
    value,
    gated,
    REMOVAL: tl.constexpr,
    DECAY: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
):
    """W, reads, and U, solutions, of each chunk; writes, by which the solutions enter the state at its end; exp of its decay, totals.

    Without REMOVAL a and b are the keys. Grid: (chunks, batch * heads, blocks of value + blocks of key).
    """
    T: tl.constexpr = v.dtype.element_ty
    chunk = tl.program_id(0)
    series = tl.program_id(1)
    head = series % heads
    token = (series // heads).to(tl.int64) * length + chunk * C
    limit = tl.minimum(length - chunk * C, C)
    decayed = limit * gated
    i = tl.arange(0, C)
    rows = (i < limit)[:, None]
    square = (series.to(tl.int64) * chunks + chunk) * (C * C) + (i[:, None] * C + i[None, :])
    row = series.to(tl.int64) * length + chunk * C
    value_blocks = tl.cdiv(value, B)
    if tl.program_id(2) < value_blocks:
        columns = tl.program_id(2) * B + tl.arange(0, B)
        inside = rows & (columns < value)[None, :]
        v_rows = get(v + (token * heads + head) * value + (i[:, None] * (heads * value) + columns[None, :]), inside)
        left = tl.load((mixed if REMOVAL else inverses) + square)
        solution = wide_dot(left, v_rows.to(tl.float32), True, T == tl.float32)
        tl.store(solutions + row * value + (i[:, None] * value + columns[None, :]), solution, mask=inside)
    else:
        columns = (tl.program_id(2) - value_blocks) * B + tl.arange(0, B)
        inside = rows & (columns < key)[None, :]
        at = (token * heads + head) * key + (i[:, None] * (heads * key) + columns[None, :])
        g, stride = decays_of(decay, token, heads, head, key, DECAY)
        a_rows = get(a + at, inside).to(tl.float32)
        b_rows = get(b + at, inside).to(tl.float32)
        a_rows *= tl.exp(sums(g, stride, -1 if REMOVAL else 0, i, columns, decayed, key, False, DECAY))
        b_rows *= tl.exp(sums(g, stride, 1, i, columns, decayed, key, True, DECAY))
        found = total(g, stride, i, columns, decayed, key, DECAY, B)
        tl.store(totals + (series.to(tl.int64) * chunks + chunk) * key + columns, found, mask=columns < key)
        solution = wide_dot(tl.load(inverses + square), a_rows, True, True)
        to = row * key + (i[:, None] * key + columns[None, :])
        tl.store(reads + to, solution if REMOVAL else -solution, mask=inside)
        tl.store(writes + to, b_rows, mask=inside)


@triton.jit
def carry_corrected(
    states,
    totals,
    reads,
    solutions,
    writes,
    initial_state,
    last_state,
    length,
    chunks,
    key,
    value,
    REMOVAL: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Writes the state before each chunk and the last one, and completes the solutions to U + W S.

    With REMOVAL, states holds what each chunk adds by its write keys. The state is in TILES tiles of BK keys, which are at least `key`
    together, and one is multiplied after the other, so that the registers hold the factors of one. Grid: (blocks of value, batch * heads).
    """
    series = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    rows = tl.arange(0, BK)
    in_value = (columns < value)[None, :]
    square = rows[:, None] * value + columns[None, :]
    initial = initial_state + series * key * value + square
    last = last_state + series * key * value + square
    here = states + series * chunks * key * value + square
    u_here = solutions + series * length * value + (i[:, None] * value + columns[None, :])
    at = series * length * key + (i[:, None] * key + rows[None, :])
    factors = totals + series * chunks * key + rows
    state = ()
    for tile in tl.static_range(TILES):
        state += (get(initial + tile * BK * value, (rows < key - tile * BK)[:, None] & in_value),)
    for chunk in tl.range(0, chunks, disable_licm=True):
        tokens = (i < length - chunk * C)[:, None]
        solution = get(u_here, tokens & in_value)
        for tile in tl.static_range(TILES):
            in_key = rows < key - tile * BK
            solution += wide_dot(get(reads + at + tile * BK, tokens & in_key[None, :]), state[tile], True, True)
        after = ()
        for tile in tl.static_range(TILES):
            in_key = rows < key - tile * BK
            inside = in_key[:, None] & in_value
            added = wide_dot(tl.trans(get(writes + at + tile * BK, tokens & in_key[None, :])), solution, True, True)
            if REMOVAL:
                added += get(here + tile * BK * value, inside)
            tl.store(here + tile * BK * value, state[tile], mask=inside)
            after += (added + state[tile] * get(factors + tile * BK, in_key)[:, None],)
        tl.store(u_here, solution, mask=tokens & in_value)
        state = after
        factors += key
        here += key * value
        u_here += C * value
        at += C * key
    for tile in tl.static_range(TILES):
        tl.store(last + tile * BK * value, state[tile], mask=(rows < key - tile * BK)[:, None] & in_value)
