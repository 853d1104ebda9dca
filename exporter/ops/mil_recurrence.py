"""The matrix recurrence of linear attention and RWKV-7 in MIL, solved chunk by chunk with matrix products; it holds in float16.

For each batch and head, with the state S (key, value)::

    S_t = exp(g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
    y_t = S_t^T q_t

The algebra of a chunk is that of `recurrence.py`. What differs is what float16 and a graph without loops ask for:

- No difference of cumulated logarithms is taken: where g is steep somewhere in the chunk, the difference of two large sums has lost
  the small one between them. Sums over stretches of tokens are products with constant matrices of zeros and ones instead.
- With a decay for each key channel, exp(G_t - G_s) is split at the border between the halves of the smallest aligned block that holds
  both tokens, into two factors that are at most 1 (after arXiv:2312.06635, section 4.3, carried down to single tokens). One product of
  matrices for each of log2(chunk) block sizes computes all pairs, and a mask keeps those that were split at its borders.
- The unit triangular system of the removals is inverted by doubling its diagonal blocks, inverse += inverse (corner) inverse. (The
  product of powers (I + A)(I + A^2)(I + A^4)... is as short, but for keys that repeat its powers grow to binomial coefficients that have
  to cancel.)
- What a chunk does to the state, S -> M S + N, is composed over the chunks as a tree: log2(chunks) levels, and work that grows with
  the number of chunks. Without removal M is diagonal, and stays a logarithm.

Tensors are (batch * heads, chunks, tokens, width).

In float16 linear attention reaches 59 to 81 dB and its last state 65 to 80 dB, RWKV-7 63 to 79 dB and 55 to 76 dB; with float32 around them
(`mil.float16_around`) both 77 to 86 dB and 73 to 82 dB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .mil import LOWEST_STEP, Var, bounded, cut, is_sequential, mb, over_tokens, pad, shift, sizes

Matrix = np.ndarray[Any, Any]

_CHUNK = 32


def recurrence(
    q: Var, k: Var, v: Var, g: Var | None, a: Var | None, b: Var | None, state: Var | None, *, heads: int, repeats: int = 1
) -> tuple[Var, Var]:
    """Solves the recurrence, in the form that `mil.sequential` chooses.

    Args:
        q: Queries (batch, length, heads * repeats * key); `repeats` consecutive heads read the same state.
        k: Write keys (batch, length, heads * key).
        v: Values (batch, length, heads * value).
        g: Logarithms of the decay, (batch, length, heads or heads * key), or None for no decay.
        a: Removal keys (batch, length, heads * key), or None for no removal.
        b: What is written back for them (batch, length, heads * key), or None.
        state: Initial state (batch, heads, key, value), or None for zeros.
        heads: The number of states.
        repeats: Heads of q for each.

    Returns:
        y (batch, length, heads * repeats * value) and the last state (batch, heads, key, value).
    """
    form = _sequential if is_sequential() else _chunked
    return form(q, k, v, g, a, b, state, heads, repeats)


def _chunked(
    q: Var, k: Var, v: Var, g: Var | None, a: Var | None, b: Var | None, state: Var | None, heads: int, repeats: int
) -> tuple[Var, Var]:
    batch, length, _ = sizes(q)
    key, value = sizes(k)[2] // heads, sizes(v)[2] // heads
    tokens = min(_CHUNK, 1 << (length - 1).bit_length())
    chunks = -(-length // tokens)
    layout = _Layout(batch, length, heads, tokens, chunks)
    k, v = layout.split(k), layout.split(v)
    q = layout.split_queries(q, repeats)
    g, a, b = (None if x is None else layout.split(x) for x in (g, a, b))
    pairs = _Pairs(tokens, repeats, None if g is None else bounded(g, LOWEST_STEP))

    carried = state is not None or chunks > 1
    reads, removals = pairs.weights(q, a, k, b)
    write, written = k, v
    effect: Var | None = None  # M, (batch * heads, chunks, key, key); None when it is diagonal
    known: Var | None = None  # w, as far as the chunk alone determines it
    through: Var | None = None  # what the state before the chunk adds to w
    if a is not None and b is not None:
        assert removals is not None
        from_values, among = cut(removals, 3, 0, tokens), cut(removals, 3, tokens, 2 * tokens)
        inverse = _unit_inverse(among, tokens)
        known = mb.matmul(x=inverse, y=mb.matmul(x=from_values, y=v))
        written = mb.concat(values=[v, known], axis=2)
        write = mb.concat(values=[k, b], axis=2)
        if carried:
            through = mb.matmul(x=inverse, y=pairs.since_start(a, inclusive=False))
    remaining = pairs.to_end(write)
    added = mb.matmul(x=remaining, y=written, transpose_x=True)
    if not carried:
        y, last = mb.matmul(x=reads, y=written), added
    else:
        if through is not None:
            kept = cut(remaining, 2, tokens, 2 * tokens)
            effect = mb.add(x=mb.matmul(x=kept, y=through, transpose_x=True), y=_diagonal(pairs.total(), key))
        before, last = _carried(effect if through is not None else pairs.total(), added, state, layout, diagonal=through is None)
        if through is not None:
            known = mb.add(x=known, y=mb.matmul(x=through, y=before))
            written = mb.concat(values=[v, known], axis=2)
        y = mb.add(x=mb.matmul(x=pairs.since_start(q, inclusive=True), y=before), y=mb.matmul(x=reads, y=written))
    return layout.join_queries(y, repeats), mb.reshape(x=last, shape=[batch, heads, key, value])


class _Layout:
    """From (batch, length, heads * width) to (batch * heads, chunks, tokens, width) and back. Tokens that are added are zeros."""

    def __init__(self, batch: int, length: int, heads: int, tokens: int, chunks: int) -> None:
        self.batch, self.length, self.heads, self.tokens, self.chunks = batch, length, heads, tokens, chunks

    def split(self, x: Var) -> Var:
        width = sizes(x)[2] // self.heads
        x = pad(x, 1, after=self.chunks * self.tokens - self.length)
        if self.heads > 1:
            x = mb.reshape(x=x, shape=[self.batch, self.chunks * self.tokens, self.heads, width])
            x = mb.transpose(x=x, perm=[0, 2, 1, 3])
        return mb.reshape(x=x, shape=[self.batch * self.heads, self.chunks, self.tokens, width])

    def split_queries(self, q: Var, repeats: int) -> Var:
        """(batch * heads, chunks, repeats * tokens, width): the heads that share a state follow each other inside the chunk."""
        if repeats == 1:
            return self.split(q)
        width = sizes(q)[2] // (self.heads * repeats)
        q = pad(q, 1, after=self.chunks * self.tokens - self.length)
        q = mb.reshape(x=q, shape=[self.batch * self.chunks, self.tokens, self.heads, repeats, width])
        q = mb.transpose(x=q, perm=[0, 2, 3, 1, 4])
        q = mb.reshape(x=q, shape=[self.batch, self.chunks, self.heads, repeats * self.tokens * width])
        q = mb.transpose(x=q, perm=[0, 2, 1, 3])
        return mb.reshape(x=q, shape=[self.batch * self.heads, self.chunks, repeats * self.tokens, width])

    def join_queries(self, y: Var, repeats: int) -> Var:
        width = sizes(y)[3]
        if repeats > 1:
            y = mb.reshape(x=y, shape=[self.batch, self.heads, self.chunks, repeats * self.tokens * width])
            y = mb.transpose(x=y, perm=[0, 2, 1, 3])
            y = mb.reshape(x=y, shape=[self.batch * self.chunks, self.heads, repeats, self.tokens, width])
            y = mb.transpose(x=y, perm=[0, 3, 1, 2, 4])
        elif self.heads > 1:
            y = mb.reshape(x=y, shape=[self.batch, self.heads, self.chunks * self.tokens, width])
            y = mb.transpose(x=y, perm=[0, 2, 1, 3])
        y = mb.reshape(x=y, shape=[self.batch, self.chunks * self.tokens, self.heads * repeats * width])
        return cut(y, 1, 0, self.length)


class _Pairs:
    """The weights between pairs of tokens of a chunk, and of tokens with the chunk's ends."""

    def __init__(self, tokens: int, repeats: int, g: Var | None) -> None:
        self.tokens, self.g = tokens, g
        self._later = np.tril(np.ones((tokens, tokens), np.float32))  # [t, s]: s <= t
        self._earlier = np.tril(self._later, -1)
        self._repeats = repeats

    def weights(self, q: Var, a: Var | None, k: Var, b: Var | None) -> tuple[Var, Var | None]:
        """q_t . exp(G_t - G_s) [k_s, b_s] for s <= t, and a_t . exp(G_{t-1} - G_s) [k_s, b_s] for s < t."""
        left = q if a is None else mb.concat(values=[q, a], axis=2)
        right = k if b is None else mb.concat(values=[k, b], axis=2)
        copies = 1 if b is None else 2
        allowed = np.tile(self._rows(self._later, self._earlier, with_removal=a is not None), (1, copies))
        if self.g is None:
            weights = mb.mul(x=mb.matmul(x=left, y=right, transpose_y=True), y=allowed)
        elif sizes(self.g)[3] == 1:
            # [t, s]: the sum of g over the tokens r with s < r <= t, or r < t for removals.
            after = mb.mul(x=self.g, y=np.tile(np.tril(np.ones_like(self._later), -1), (1, copies)))
            sums = mb.matmul(x=self._rows(self._later, self._earlier, with_removal=a is not None), y=after)
            weights = mb.mul(x=mb.matmul(x=left, y=right, transpose_y=True), y=mb.mul(x=mb.exp(x=sums), y=allowed))
        else:
            weights = self._by_halves(left, right, copies, with_removal=a is not None)
        rows = self._repeats * self.tokens
        return cut(weights, 2, 0, rows), None if a is None else cut(weights, 2, rows, rows + self.tokens)

    def _by_halves(self, left: Var, right: Var, copies: int, *, with_removal: bool) -> Var:
        own = np.eye(self.tokens, dtype=np.float32)
        nothing = np.zeros_like(own)
        mask = np.tile(self._rows(own, nothing, with_removal=with_removal), (1, copies))
        weights = mb.mul(x=mb.matmul(x=left, y=right, transpose_y=True), y=mask)
        half = 1
        while half < self.tokens:
            block = np.arange(self.tokens) // half
            same = (block[:, None] == block).astype(np.float32)
            start = self._rows(same * self._later, same * self._earlier, with_removal=with_removal)
            end = np.tile(same * self._earlier.T, (copies, 1))
            x = mb.mul(x=left, y=mb.exp(x=mb.matmul(x=start, y=self.g)))
            y = mb.mul(x=right, y=mb.exp(x=mb.matmul(x=end, y=self.g)))
            split = ((block[:, None] == block + 1) & (block % 2 == 0)).astype(np.float32)
            mask = np.tile(self._rows(split, split, with_removal=with_removal), (1, copies))
            weights = mb.add(x=weights, y=mb.mul(x=mb.matmul(x=x, y=y, transpose_y=True), y=mask))
            half *= 2
        return weights

    def _rows(self, queries: Matrix, removals: Matrix, *, with_removal: bool) -> Matrix:
        return np.concatenate([np.tile(queries, (self._repeats, 1)), *([removals] if with_removal else [])])

    def since_start(self, x: Var, *, inclusive: bool) -> Var:
        """Reading keys times the decay of what was there before the chunk."""
        if self.g is None:
            return x
        rows = np.tile(self._later if inclusive else self._earlier, (sizes(x)[2] // self.tokens, 1))
        return mb.mul(x=x, y=mb.exp(x=mb.matmul(x=rows, y=self.g)))

    def to_end(self, x: Var) -> Var:
        """Written keys times what is left of them at the end of the chunk."""
        if self.g is None:
            return x
        rows = np.tile(self._earlier.T, (sizes(x)[2] // self.tokens, 1))
        return mb.mul(x=x, y=mb.exp(x=mb.matmul(x=rows, y=self.g)))

    def total(self) -> Var | None:
        """The sum of g over the chunk (batch * heads, chunks, 1 or key, 1), or None."""
        if self.g is None:
            return None
        return mb.matmul(x=self.g, y=np.ones((self.tokens, 1), np.float32), transpose_x=True)


def _diagonal(log: Var | None, key: int) -> Var | Matrix:
    unit = np.eye(key, dtype=np.float32)
    return unit if log is None else mb.mul(x=mb.exp(x=log), y=unit)


def _unit_inverse(among: Var, tokens: int) -> Var:
    """The inverse of I - A for a strictly lower triangular A (batch * heads, chunks, tokens, tokens)."""
    inverse: Var = np.eye(tokens, dtype=np.float32)
    half = 1
    while half < tokens:
        block = np.arange(tokens) // half
        corner = mb.mul(x=among, y=((block[:, None] == block + 1) & (block % 2 == 0)).astype(np.float32))
        if half > 1:  # the inverse of single tokens is I
            corner = mb.matmul(x=mb.matmul(x=inverse, y=corner), y=inverse)
        inverse = mb.add(x=inverse, y=corner) if half > 1 else mb.add(x=corner, y=inverse)
        half *= 2
    return inverse


def _carried(effect: Var | None, added: Var, state: Var | None, layout: _Layout, *, diagonal: bool) -> tuple[Var, Var]:
    """The state before each chunk (batch * heads, chunks, key, value), and the last one (batch * heads, 1, key, value).

    Args:
        effect: What a chunk does to the state: a matrix, or with `diagonal` the logarithm of its diagonal, None where that is 0.
        added: What a chunk adds.
        state: The initial state, or None.
        layout: The sizes.
        diagonal: See `effect`.
    """
    key, value = sizes(added)[2:]
    # The initial state is what a chunk before the first adds.
    if state is None:
        added = pad(added, 1, before=1)
    else:
        added = mb.concat(values=[mb.reshape(x=state, shape=[layout.batch * layout.heads, 1, key, value]), added], axis=1)
    effect = None if effect is None else pad(effect, 1, before=1)
    if not diagonal:

        def apply(m: Var, s: Var) -> Var:
            return mb.matmul(x=m, y=s)

        compose = apply
    else:

        def apply(m: Var, s: Var) -> Var:
            return s if m is None else mb.mul(x=mb.exp(x=m), y=s)

        def compose(m: Var, s: Var) -> Var:
            return None if m is None else bounded(mb.add(x=m, y=s))

    states = _prefix(effect, added, apply, compose)
    return cut(states, 1, 0, layout.chunks), cut(states, 1, layout.chunks, layout.chunks + 1)


def _prefix(effect: Var | None, added: Var, apply: Callable[[Var, Var], Var], compose: Callable[[Var, Var], Var]) -> Var:
    """S_i = effect_i S_{i-1} + added_i along axis 1, with S_{-1} = 0 (Ladner and Fischer, 1980): neighbours are composed, the half as many
    are solved, and what lies between them follows.
    """
    rows, count, *matrix = sizes(added)
    if count == 1:
        return added
    effect, added = (None if x is None else pad(x, 1, after=count % 2) for x in (effect, added))
    even = count + count % 2
    (m0, s0), (m1, s1) = ((None if effect is None else cut(effect, 1, i, even, 2), cut(added, 1, i, even, 2)) for i in (0, 1))
    second = _prefix(compose(m1, m0) if even > 2 else None, mb.add(x=s1, y=apply(m1, s0)), apply, compose)
    first = mb.add(x=s0, y=apply(m0, shift(second, 1, 1))) if even > 2 else s0
    both = mb.reshape(x=mb.stack(values=[first, second], axis=2), shape=[rows, even, *matrix])
    return cut(both, 1, 0, count)


def _sequential(
    q: Var, k: Var, v: Var, g: Var | None, a: Var | None, b: Var | None, state: Var | None, heads: int, repeats: int
) -> tuple[Var, Var]:
    batch, length, _ = sizes(q)
    key, value = sizes(k)[2] // heads, sizes(v)[2] // heads
    given = {name: x for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("a", a), ("b", b)) if x is not None}

    def step(slices: list[Var], state: Var) -> tuple[Var, Var]:
        at = dict(zip(given, slices, strict=True))

        def columns(name: str) -> Var:
            width = sizes(given[name])[2] // heads
            return mb.reshape(x=at[name], shape=[batch, heads, width, 1])

        kept = mb.mul(x=mb.exp(x=columns("g")), y=state) if "g" in at else state
        after = mb.add(x=kept, y=mb.mul(x=columns("k"), y=mb.reshape(x=at["v"], shape=[batch, heads, 1, value])))
        if "a" in at:
            removed = mb.matmul(x=columns("a"), y=state, transpose_x=True)
            after = mb.add(x=after, y=mb.mul(x=columns("b"), y=removed))
        y = mb.matmul(x=mb.reshape(x=at["q"], shape=[batch, heads, repeats, key]), y=after)
        return mb.reshape(x=y, shape=[batch, 1, heads * repeats * value]), after

    first = state if state is not None else mb.fill(shape=[batch, heads, key, value], value=0.0)
    return over_tokens(length, list(given.values()), first, (batch, length, heads * repeats * value), step)
