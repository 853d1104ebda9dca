# ruff: noqa: SIM108, SIM300
# Triton compares and branches on constants only as written here: T to the left, statements rather than expressions.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""GPU kernels of the matrix recurrence that linear attention and RWKV-7 share, parallel over the chunks of the sequence.

The algebra is that of `recurrence`: for each batch and head, with the state S (key, value)::

    S_t = exp(g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    y_t = S_t^T q_t

Without removal (a, b) there are three passes. `chunk_states`: what each chunk alone adds to the state, and its total decay. `carry_states`:
the state before every chunk. `chunk_outputs`: queries times that state, and the products inside the chunk.

With removal, w_t = a_t^T S_{t-1} is affine in the state S_0 before the chunk, w = W S_0 + U. `chunk_inverses` inverts the unit triangular
system of each chunk, `chunk_solutions` computes W and U, `carry_corrected` goes over the chunks with two products each, and `chunk_outputs`
is as above. All but `carry_states` and `carry_corrected` are parallel over chunks; these two are parallel over the columns of the state.

Every exponent is a sum of decays over a stretch of tokens that is summed as it is, never a difference of two long sums: with decays of at
most 0 nothing overflows, nothing cancels, and a decay of minus infinity clears the state. Products of activations are tensor-core products
in their dtype. Products of float32 matrices, among them all that go into a state, are tensor-core products too: each factor is split into
two TF32 numbers, and the product of the two small parts is left out, which is 2^-22 of the product, less than sums of float32 lose. What
goes into y alone is split into two numbers of the activations' dtype, for float16 after division by a power of two, so that it stays in
range; factors scaled by decays inside a chunk are rounded to it.

Names: C tokens a chunk, BK and BV blocks over key and value, T the dtype in which activations are multiplied. DECAY is 0 without decay, 1
for one a head, 2 for one a key channel. Tensors of the node are (batch, length, heads * width); reads, solutions and writes are
(batch * heads, length, width).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _get(base, inside):
    return tl.load(base, mask=inside, other=0.0)


@triton.jit
def _tf32(x):
    """The matrix x rounded to the 11 significant bits of TF32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _wide_dot(a, b, SPLIT_A: tl.constexpr, SPLIT_B: tl.constexpr):
    """Product a @ b of float32 matrices with float32's accuracy. A factor of few enough bits need not be split."""
    high_a = a
    high_b = b
    if SPLIT_A:
        high_a = _tf32(a)
    if SPLIT_B:
        high_b = _tf32(b)
    result = tl.dot(high_a, high_b, input_precision="tf32")
    if SPLIT_A:
        result = tl.dot(_tf32(a - high_a), high_b, result, input_precision="tf32")
    if SPLIT_B:
        result = tl.dot(high_a, _tf32(b - high_b), result, input_precision="tf32")
    return result


@triton.jit
def _rounded_dot(a, b, WIDE: tl.constexpr, T: tl.constexpr):
    """Product a @ b of matrices that are rounded to T, or that are float32 if WIDE."""
    if WIDE or T == tl.float32:
        result = _wide_dot(a, b, True, True)
    else:
        result = tl.dot(a.to(T), b.to(T))
    return result


@triton.jit
def _halves(x, AXIS: tl.constexpr, T: tl.constexpr):
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
def _left_dot(a, b, T: tl.constexpr):
    """Product a @ b, a in T, b in float32."""
    if T == tl.float32:
        result = _wide_dot(a, b, True, True)
    else:
        high, low, scale = _halves(b, 0, T)
        result = tl.dot(a, low, tl.dot(a, high)) * scale
    return result


@triton.jit
def _right_dot(a, b, T: tl.constexpr):
    """Product a @ b, a in float32, b in T."""
    if T == tl.float32:
        result = _wide_dot(a, b, True, True)
    else:
        high, low, scale = _halves(a, 1, T)
        result = tl.dot(low, b, tl.dot(high, b)) * scale
    return result


@triton.jit
def _both_dot(a, b, T: tl.constexpr):
    """Product a @ b, both in float32."""
    if T == tl.float32:
        result = _wide_dot(a, b, True, True)
    else:
        high_a, low_a, scale_a = _halves(a, 1, T)
        high_b, low_b, scale_b = _halves(b, 0, T)
        result = tl.dot(high_a, low_b, tl.dot(low_a, high_b, tl.dot(high_a, high_b))) * scale_a * scale_b
    return result


@triton.jit
def _decays(decay, token, heads, head, key, DECAY: tl.constexpr):
    """The address of a head's decays at a token, and how far it is to the next token."""
    stride = heads
    offset = head
    if DECAY == 2:
        stride = heads * key
        offset = head * key
    return decay + token * stride + offset, stride


@triton.jit
def _sums(decay, stride, shift, i, columns, limit, key, REVERSE: tl.constexpr, DECAY: tl.constexpr):
    """Running sums of the decays of the tokens i + shift, (tokens, columns) or (tokens, 1). A shift of 1 sums what follows a token, one of
    -1 what precedes it.
    """
    row = i + shift
    inside = (row >= 0) & (row < limit)
    if DECAY == 2:
        g = _get(decay + (row * stride)[:, None] + columns[None, :], inside[:, None] & (columns < key)[None, :])
    else:
        g = _get(decay + row * stride, inside)[:, None]
    return tl.cumsum(g.to(tl.float32), 0, reverse=REVERSE)


@triton.jit
def _total(decay, stride, i, columns, limit, key, DECAY: tl.constexpr, B: tl.constexpr):
    """Exp of the sum of a chunk's decays, (columns)."""
    if DECAY == 2:
        g = _get(decay + (i * stride)[:, None] + columns[None, :], (i < limit)[:, None] & (columns < key)[None, :])
        total = tl.sum(g.to(tl.float32), 0)
    else:
        total = tl.sum(_get(decay + i * stride, i < limit).to(tl.float32), 0) + tl.zeros((B,), tl.float32)
    return tl.exp(total)


@triton.jit
def _products(
    x,
    x_stride,
    y,
    stride,
    decay,
    decay_stride,
    key,
    limit,
    BEFORE: tl.constexpr,
    STRICT: tl.constexpr,
    WIDE: tl.constexpr,
    DECAY: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
):
    """x_t . exp(G) y_s for s <= t, or s < t if STRICT, else 0, (C, C); G sums the decays after s up to t, or up to t - 1 if BEFORE. WIDE:
    with float32's accuracy.

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
        x_rows = _get(x + (i[:, None] * x_stride + columns[None, :]), inside)
        y_rows = _get(y + (i[:, None] * stride + columns[None, :]), inside)
        if DECAY != 2:
            result += _rounded_dot(x_rows, tl.trans(y_rows), False, T)
        else:
            x_rows = x_rows.to(tl.float32)
            y_rows = y_rows.to(tl.float32)
            # Sums of decays are products with zeros and ones, which infinity would spoil; exp of the limit is 0.
            g = _get(decay + (i[:, None] * decay_stride + columns[None, :]), inside).to(tl.float32)
            g = tl.maximum(g, -1e4)
            for level in tl.range(0, 6, disable_licm=True):
                distance = apart >> level
                upto = (distance == 0) & allowed
                if BEFORE:
                    upto = (distance == 0) & earlier
                since = _wide_dot(tl.where(upto, 1.0, 0.0), g, False, True)
                left = _wide_dot(tl.where((distance == 0) & later, 1.0, 0.0), g, False, True)
                scaled = x_rows * tl.exp(since)
                result += tl.where(distance == 1, _rounded_dot(scaled, tl.trans(y_rows * tl.exp(left)), WIDE, T), 0.0)
            if not STRICT:
                result += tl.where(apart == 0, tl.sum(x_rows * y_rows, 1)[:, None], 0.0)
    if DECAY == 1:
        g = _get(decay + i * decay_stride, i < limit).to(tl.float32)
        factor = tl.exp(tl.cumsum(tl.where(earlier, g[:, None], 0.0), 0))
        result *= factor
    if STRICT:
        allowed = earlier
    return tl.where(allowed, result, 0.0)


@triton.jit
def _inverse(a, C: tl.constexpr):
    """(1 - a)^-1 for a strictly lower triangular (C, C): forward substitution in blocks, whose size doubles."""
    i = tl.arange(0, C)
    apart = i[:, None] ^ i[None, :]
    # In blocks of one the inverse is 1, so that the first doubling is an addition.
    inverse = tl.where(apart == 0, 1.0, tl.where(apart == 1, a, 0.0))
    for level in tl.range(1, 6, disable_licm=True):
        below = tl.where(apart >> level == 1, a, 0.0)
        inverse += _wide_dot(_wide_dot(inverse, below, True, True), inverse, True, True)
    return inverse


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
    k_rows = _get(k + k_at, rows & (columns < key)[None, :])
    v_rows = _get(v + v_at, rows & (value_columns < value)[None, :])
    place = series.to(tl.int64) * chunks + chunk
    if DECAY == 0:
        added = _rounded_dot(tl.trans(k_rows), v_rows, False, T)
    else:
        g, stride = _decays(decay, token, heads, head, key, DECAY)
        remains = tl.exp(_sums(g, stride, 1, i, columns, limit, key, True, DECAY))
        added = _wide_dot(tl.trans(k_rows.to(tl.float32) * remains), v_rows.to(tl.float32), True, T == tl.float32)
        if value_block == 0:
            total = _total(g, stride, i, columns, limit, key, DECAY, BK)
            tl.store(totals + place * key + columns, total, mask=columns < key)
    inside = (columns < key)[:, None] & (value_columns < value)[None, :]
    tl.store(states + place * key * value + (columns[:, None] * value + value_columns[None, :]), added, mask=inside)


@triton.jit
def carry_states(states, totals, initial_state, last_state, chunks, key, value, DECAY: tl.constexpr, B: tl.constexpr):
    """Replaces what each chunk adds by the state before it, and writes the last one. Grid: (blocks of key * value, batch * heads)."""
    series = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * B + tl.arange(0, B)
    size = key * value
    inside = i < size
    state = _get(initial_state + series * size + i, inside)
    here = states + series * chunks * size + i
    factors = totals + series * chunks * key + i // value
    # The next chunk is read before this one is written, so that the loads of one step overlap with the stores of the one before.
    added = _get(here, inside)
    for chunk in range(chunks):
        ahead = _get(here + size, inside & (chunk + 1 < chunks))
        tl.store(here, state, mask=inside)
        if DECAY != 0:
            state = state * _get(factors, inside)
            factors += key
        state += added
        added = ahead
        here += size
    tl.store(last_state + series * size + i, state, mask=inside)


@triton.jit
def chunk_products(
    x,
    y,
    decay,
    products,
    length,
    chunks,
    heads,
    key,
    BEFORE: tl.constexpr,
    STRICT: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
):
    """The decayed products inside each chunk, with a decay a key channel: products (batch, heads, chunks, C, C).

    Grid: (chunks, batch * heads).

    A kernel apart, because two of them in one do not fit the registers.
    """
    T: tl.constexpr = x.dtype.element_ty
    chunk = tl.program_id(0)
    series = tl.program_id(1)
    head = series % heads
    token = (series // heads).to(tl.int64) * length + chunk * C
    limit = tl.minimum(length - chunk * C, C)
    g, g_stride = _decays(decay, token, heads, head, key, 2)
    i = tl.arange(0, C)
    offset = (token * heads + head) * key
    stride = heads * key
    found = _products(x + offset, stride, y + offset, stride, g, g_stride, key, limit, BEFORE, STRICT, True, 2, T, C, BK)
    tl.store(products + (series.to(tl.int64) * chunks + chunk) * (C * C) + (i[:, None] * C + i[None, :]), found)


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
    g, g_stride = _decays(decay, token, heads, head, key, DECAY)
    i = tl.arange(0, C)
    offset = (token * heads + head) * key
    stride = heads * key
    place = (series.to(tl.int64) * chunks + chunk) * (C * C) + (i[:, None] * C + i[None, :])
    if REMOVAL:
        system = _products(a + offset, stride, b + offset, stride, g, g_stride, key, limit, True, True, True, DECAY, T, C, BK)
        inverse = _inverse(system, C)
        tl.store(inverses + place, inverse)
        tl.store(mixed + place, _wide_dot(inverse, tl.load(mixed + place), True, True))
    else:
        rates = _get(beta + token * betas + tl.where(betas > 1, head, 0) + i * betas, i < limit).to(tl.float32)
        keys = k + offset
        system = _products(keys, stride, keys, stride, g, g_stride, key, limit, False, True, True, DECAY, T, C, BK)
        tl.store(inverses + place, _inverse(-rates[:, None] * system, C) * rates[None, :])


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
    i = tl.arange(0, C)
    rows = (i < limit)[:, None]
    square = (series.to(tl.int64) * chunks + chunk) * (C * C) + (i[:, None] * C + i[None, :])
    row = series.to(tl.int64) * length + chunk * C
    value_blocks = tl.cdiv(value, B)
    if tl.program_id(2) < value_blocks:
        columns = tl.program_id(2) * B + tl.arange(0, B)
        inside = rows & (columns < value)[None, :]
        v_rows = _get(v + (token * heads + head) * value + (i[:, None] * (heads * value) + columns[None, :]), inside)
        left = tl.load((mixed if REMOVAL else inverses) + square)
        solution = _wide_dot(left, v_rows.to(tl.float32), True, T == tl.float32)
        tl.store(solutions + row * value + (i[:, None] * value + columns[None, :]), solution, mask=inside)
    else:
        columns = (tl.program_id(2) - value_blocks) * B + tl.arange(0, B)
        inside = rows & (columns < key)[None, :]
        at = (token * heads + head) * key + (i[:, None] * (heads * key) + columns[None, :])
        a_rows = _get(a + at, inside).to(tl.float32)
        b_rows = _get(b + at, inside).to(tl.float32)
        if DECAY != 0:
            g, stride = _decays(decay, token, heads, head, key, DECAY)
            a_rows *= tl.exp(_sums(g, stride, -1 if REMOVAL else 0, i, columns, limit, key, False, DECAY))
            b_rows *= tl.exp(_sums(g, stride, 1, i, columns, limit, key, True, DECAY))
            total = _total(g, stride, i, columns, limit, key, DECAY, B)
            tl.store(totals + (series.to(tl.int64) * chunks + chunk) * key + columns, total, mask=columns < key)
        solution = _wide_dot(tl.load(inverses + square), a_rows, True, True)
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
    DECAY: tl.constexpr,
    C: tl.constexpr,
    KEY: tl.constexpr,
    BV: tl.constexpr,
):
    """Writes the state before each chunk and the last one, and completes the solutions to U + W S.

    With REMOVAL, states holds what each chunk adds by its write keys. KEY is a power of two, at least
    `key`. Grid: (blocks of value, batch * heads).
    """
    series = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    rows = tl.arange(0, KEY)
    in_key = rows < key
    in_value = (columns < value)[None, :]
    inside = in_key[:, None] & in_value
    square = rows[:, None] * value + columns[None, :]
    state = _get(initial_state + series * key * value + square, inside)
    here = states + series * chunks * key * value + square
    u_here = solutions + series * length * value + (i[:, None] * value + columns[None, :])
    at = series * length * key + (i[:, None] * key + rows[None, :])
    factors = totals + series * chunks * key + rows
    for chunk in tl.range(0, chunks, disable_licm=True):
        tokens = (i < length - chunk * C)[:, None]
        solution = _get(u_here, tokens & in_value)
        solution += _wide_dot(_get(reads + at, tokens & in_key[None, :]), state, True, True)
        after = _wide_dot(tl.trans(_get(writes + at, tokens & in_key[None, :])), solution, True, True)
        if REMOVAL:
            after += _get(here, inside)
        if DECAY != 0:
            after += state * _get(factors, in_key)[:, None]
            factors += key
        else:
            after += state
        tl.store(here, state, mask=inside)
        tl.store(u_here, solution, mask=tokens & in_value)
        state = after
        here += key * value
        u_here += C * value
        at += C * key
    tl.store(last_state + series * key * value + square, state, mask=inside)


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
    SCALED: tl.constexpr,
    GIVEN: tl.constexpr,
    SOLVED: tl.constexpr,
    DECAY: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """The outputs y of each chunk. Grid: (chunks, batch * heads of q, blocks of value).

    GIVEN: k and v are written to the state as they are. SOLVED: the solutions are, by k, or, if both, by keys of their own; both products
    of queries and keys are then given, and a head of q has its own state. SCALED: y is multiplied by scale, 0 standing for
    1 / sqrt(key). `repeats` heads of q share a state.
    """
    T: tl.constexpr = q.dtype.element_ty
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
    g, g_stride = _decays(decay, token, heads, head, key, DECAY)
    q_base = q + (token * query_heads + query_head) * key
    q_stride = query_heads * key
    offset = (token * heads + head) * key
    state = states + (series * chunks + chunk) * key * value
    result = tl.zeros((C, BV), tl.float32)
    for start in range(0, key, BK):
        columns = start + tl.arange(0, BK)
        q_rows = _get(q_base + (i[:, None] * q_stride + columns[None, :]), rows & (columns < key)[None, :])
        if DECAY == 2:
            q_rows = q_rows.to(tl.float32) * tl.exp(_sums(g, g_stride, 0, i, columns, limit, key, False, DECAY))
        carried = _get(state + (columns[:, None] * value + value_columns[None, :]), (columns < key)[:, None] & in_value)
        result += _left_dot(q_rows.to(T), carried, T)
    if DECAY == 1:
        result *= tl.exp(_sums(g, g_stride, 0, i, i, limit, key, False, DECAY))
    # With two kinds of keys there are twice as many products, whose rounding would take more than y's own leaves: they come in float32.
    stride = heads * key
    square = (series * chunks + chunk) * (C * C) + (i[:, None] * C + i[None, :])
    if GIVEN:
        if SOLVED:
            weights = tl.load(given_products + square)
        else:
            weights = _products(q_base, q_stride, k + offset, stride, g, g_stride, key, limit, False, False, False, DECAY, T, C, BK)
        v_rows = _get(v + (token * heads + head) * value + (i[:, None] * (heads * value) + value_columns[None, :]), rows & in_value)
        result += _right_dot(weights, v_rows.to(T), T)
    if SOLVED:
        if GIVEN:
            weights = tl.load(solved_products + square)
        else:
            weights = _products(q_base, q_stride, k + offset, stride, g, g_stride, key, limit, False, False, False, DECAY, T, C, BK)
        u_rows = _get(solutions + (series * length + chunk * C) * value + (i[:, None] * value + value_columns[None, :]), rows & in_value)
        result += _both_dot(weights, u_rows, T)
    if SCALED:
        result *= tl.where(scale != 0.0, scale, 1.0 / tl.sqrt(key.to(tl.float32)))
    to = y + (token * query_heads + query_head) * value + (i[:, None] * (query_heads * value) + value_columns[None, :])
    tl.store(to, result.to(y.dtype.element_ty), mask=rows & in_value)


@triton.jit
def recurrent(
    q,
    k,
    v,
    a,
    b,
    beta,
    decay,
    initial_state,
    y,
    last_state,
    scale,
    length,
    heads,
    repeats,
    betas,
    key,
    value,
    SCALED: tl.constexpr,
    RULE: tl.constexpr,
    DECAY: tl.constexpr,
    KEY: tl.constexpr,
    BV: tl.constexpr,
):
    """Token by token: for single steps and short sequences, in one launch. Grid: (blocks of value, batch * heads).

    RULE is 0 without removal, 1 for the delta rules, 2 for a removal key of its own. KEY is a power of two, at least `key`.
    """
    series = tl.program_id(1)
    head = series % heads
    batch = (series // heads).to(tl.int64)
    rows = tl.arange(0, KEY)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    in_key = rows < key
    in_value = columns < value
    inside = in_key[:, None] & in_value[None, :]
    square = series.to(tl.int64) * key * value + (rows[:, None] * value + columns[None, :])
    state = _get(initial_state + square, inside)
    factor = 1.0
    if SCALED:
        factor = tl.where(scale != 0.0, scale, 1.0 / tl.sqrt(key.to(tl.float32)))
    for t in range(length):
        token = batch * length + t
        at = (token * heads + head) * key + rows
        k_t = _get(k + at, in_key).to(tl.float32)
        v_t = _get(v + (token * heads + head) * value + columns, in_value).to(tl.float32)
        if RULE == 2:
            removed = tl.sum(_get(a + at, in_key).to(tl.float32)[:, None] * state, 0)
        if DECAY == 1:
            state *= tl.exp(tl.load(decay + token * heads + head).to(tl.float32))
        if DECAY == 2:
            state *= tl.exp(_get(decay + at, in_key).to(tl.float32))[:, None]
        if RULE == 1:
            rate = tl.load(beta + token * betas + tl.where(betas > 1, head, 0)).to(tl.float32)
            v_t = rate * (v_t - tl.sum(k_t[:, None] * state, 0))
        state += k_t[:, None] * v_t[None, :]
        if RULE == 2:
            state += _get(b + at, in_key).to(tl.float32)[:, None] * removed[None, :]
        for repeat in range(repeats):
            query = (token * heads + head) * repeats + repeat
            q_t = _get(q + query * key + rows, in_key).to(tl.float32)
            y_t = tl.sum(q_t[:, None] * state, 0) * factor
            tl.store(y + query * value + columns, y_t.to(y.dtype.element_ty), mask=in_value)
    tl.store(last_state + square, state, mask=inside)
