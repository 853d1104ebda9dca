# Triton compares and branches on constants only as written here: T to the left, statements rather than expressions.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Decays, and their sums over stretches of a chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from .products import get


@triton.jit
def decays_of(decay, token, heads, head, key, DECAY: tl.constexpr):
    """The address of a head's decays at a token, and how far it is to the next token."""
    stride = heads
    offset = head
    if DECAY == 2:
        stride = heads * key
        offset = head * key
    return decay + token * stride + offset, stride


@triton.jit
def sums(decay, stride, shift, i, columns, limit, key, REVERSE: tl.constexpr, DECAY: tl.constexpr):
    """Running sums of the decays of the tokens i + shift, (tokens, columns) or (tokens, 1). A shift of 1 sums what follows a token, one of
    -1 what precedes it.
    """
    row = i + shift
    inside = (row >= 0) & (row < limit)
    if DECAY == 2:
        g = get(decay + (row * stride)[:, None] + columns[None, :], inside[:, None] & (columns < key)[None, :])
    else:
        g = get(decay + row * stride, inside)[:, None]
    return tl.cumsum(g.to(tl.float32), 0, reverse=REVERSE)


@triton.jit
def total(decay, stride, i, columns, limit, key, DECAY: tl.constexpr, B: tl.constexpr):
    """Exp of the sum of a chunk's decays, (columns)."""
    if DECAY == 2:
        g = get(decay + (i * stride)[:, None] + columns[None, :], (i < limit)[:, None] & (columns < key)[None, :])
        found = tl.sum(g.to(tl.float32), 0)
    else:
        found = tl.sum(get(decay + i * stride, i < limit).to(tl.float32), 0) + tl.zeros((B,), tl.float32)
    return tl.exp(found)
