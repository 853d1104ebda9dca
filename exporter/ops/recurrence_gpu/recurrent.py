# Triton compares and branches on constants only as written here: T to the left, statements rather than expressions.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Token by token: for single steps, for short sequences, and for sizes that the kernels over chunks do not take."""

from __future__ import annotations

import triton
import triton.language as tl

from .products import get


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
    decays,
    rule,
    key,
    value,
    SCALED: tl.constexpr,
    KEY: tl.constexpr,
    BV: tl.constexpr,
):
    """The whole recurrence in one launch. Grid: (blocks of value, batch * heads).

    `rule` is 0 without removal, 1 for the delta rules, 2 for a removal key of its own; `decays` is how many decays a head has: 0, 1 or
    `key`. What every program of a launch decides alike costs next to nothing, and so one kernel serves every rule. KEY is a power of two,
    at least `key`.
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
    state = get(initial_state + square, inside)
    factor = 1.0
    if SCALED:
        factor = tl.where(scale != 0.0, scale, 1.0 / tl.sqrt(key.to(tl.float32)))
    decay_rows = rows * tl.where(decays > 1, 1, 0)
    for t in range(length):
        token = batch * length + t
        at = (token * heads + head) * key + rows
        k_t = get(k + at, in_key).to(tl.float32)
        v_t = get(v + (token * heads + head) * value + columns, in_value).to(tl.float32)
        removed = tl.zeros((BV,), tl.float32)
        if rule == 2:
            removed = tl.sum(get(a + at, in_key).to(tl.float32)[:, None] * state, 0)
        if decays != 0:
            state *= tl.exp(get(decay + (token * heads + head) * decays + decay_rows, in_key).to(tl.float32))[:, None]
        if rule == 1:
            rate = tl.load(beta + token * betas + tl.where(betas > 1, head, 0)).to(tl.float32)
            v_t = rate * (v_t - tl.sum(k_t[:, None] * state, 0))
        state += k_t[:, None] * v_t[None, :]
        if rule == 2:
            state += get(b + at, in_key).to(tl.float32)[:, None] * removed[None, :]
        for repeat in range(repeats):
            query = (token * heads + head) * repeats + repeat
            q_t = get(q + query * key + rows, in_key).to(tl.float32)
            y_t = tl.sum(q_t[:, None] * state, 0) * factor
            tl.store(y + query * value + columns, y_t.to(y.dtype.element_ty), mask=in_value)
    tl.store(last_state + square, state, mask=inside)
