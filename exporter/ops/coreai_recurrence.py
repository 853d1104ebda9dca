"""The matrix recurrence that linear attention and RWKV-7 share, for Core AI: chunks of tokens with matrix products, and a loop over chunks.

The formulas are those of `exporter.ops.recurrence`: every exponent is a sum of log-decays over a stretch of tokens, at most 0. What differs
is the triangular system of the removal keys, for which Core AI has no solver: it is inverted by doubling blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .coreai_chunks import Step, scan_chunks

# With a decay for each key channel the exponents are (tokens, tokens, key) for each head: a short chunk bounds them.
_CHUNK = 64
_CHUNK_PER_KEY = 16

_NAMES = ("q", "k", "v", "g", "a", "b")


def scan(sequences: dict[str, Tensor], state: Tensor, *, repeats: int, scale: float) -> tuple[Tensor, Tensor]:
    """Solves the recurrence.

    Args:
        sequences: q (batch, length, heads * repeats * key), k (batch, length, heads * key), v (batch, length, heads * value);
            optionally the logarithms of the decay g (batch, length, heads or heads * key), at most 0; removal keys a and what is written
            back for them b (batch, length, heads * key).
        state: Initial state (batch, heads, key, value), float32.
        repeats: Consecutive heads of q that share a state.
        scale: Factor of the outputs.

    Returns:
        y (batch, length, heads * repeats * value) in the dtype of q, and the last state.
    """
    names = tuple(name for name in _NAMES if name in sequences)
    heads, key, value = state.shape[1:]
    per_key = "g" in sequences and sequences["g"].shape[2] > heads
    size = _CHUNK_PER_KEY if per_key else _CHUNK
    length = sequences["q"].shape[1]
    if isinstance(length, int):
        size = min(size, length)
    step = _step(names, heads, key, repeats, scale)
    removal = "a" in names
    constants = _masks(size, sequences["q"].device, removal=removal)
    return scan_chunks(step, [sequences[name] for name in names], state, constants, size=size, width=heads * repeats * value)


def _step(names: tuple[str, ...], heads: int, key: int, repeats: int, scale: float) -> Step:
    def step(chunk: Sequence[Tensor], state: Tensor, constants: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        # Batch and heads are one axis, and `bmm` is called by name: `@` would be five operators a product instead of one.
        batch, tokens = chunk[0].shape[:2]
        given = dict(zip(names, (x.float() for x in chunk), strict=True))
        # The query heads that share a state lie one after the other along the tokens.
        q = given.pop("q").reshape(batch, tokens, heads, repeats, key).permute(0, 2, 3, 1, 4).reshape(-1, repeats * tokens, key)
        given = {name: x.reshape(batch, tokens, heads, -1).transpose(1, 2).flatten(0, 1) for name, x in given.items()}
        k, v, g = given["k"], given["v"], given.get("g")
        carried = state.flatten(0, 1)
        later, earlier, levels = constants if "a" in names else (constants[0], None, None)
        through = before = read = None
        if g is not None:
            through = g.cumsum(1)
            before = through - g
            read = _repeat(through, repeats)
        later_of_q = later if repeats == 1 else torch.cat([later] * repeats)
        y = torch.bmm(q if read is None else q * read.exp(), carried) + torch.bmm(_weights(q, k, read, through, later_of_q), v)
        left, right = k, v
        if earlier is not None and levels is not None:
            a, b = given["a"], given["b"]
            known = torch.bmm(a if before is None else a * before.exp(), carried) + torch.bmm(_weights(a, k, before, through, earlier), v)
            w = torch.bmm(_inverse(_weights(a, b, before, through, earlier), levels), known)
            y = y + torch.bmm(_weights(q, b, read, through, later_of_q), w)
            left, right = torch.cat([k, b], dim=1), torch.cat([v, w], dim=1)
        if through is not None:
            end = through[:, -1:]
            remains = (end - through).exp()
            left = left * (remains if left is k else _repeat(remains, 2))
            carried = end.transpose(1, 2).exp() * carried
        last = carried + torch.bmm(left.transpose(1, 2), right)
        y = (y * scale).reshape(batch, heads, repeats, tokens, -1).permute(0, 3, 1, 2, 4)
        return y.reshape(batch, tokens, -1), last.reshape(state.shape)

    return step


def _repeat(x: Tensor, repeats: int) -> Tensor:
    """(batch * heads, tokens, width) to (batch * heads, repeats * tokens, width)."""
    return x if repeats == 1 else torch.cat([x] * repeats, dim=1)


def _weights(x: Tensor, y: Tensor, to: Tensor | None, since: Tensor | None, allowed: Tensor) -> Tensor:
    """x_t . exp(to_t - since_s) y_s for the pairs (t, s) that are allowed, else 0: (batch * heads, tokens of x, tokens of y)."""
    if to is None or since is None:
        return torch.bmm(x, y.transpose(1, 2)) * allowed
    # The exponents of pairs that are not allowed may be positive and large: they are cut before exp. The others are at most 0.
    if to.shape[2] == 1:
        return torch.bmm(x, y.transpose(1, 2)) * (to - since.transpose(1, 2)).clamp(max=0.0).exp() * allowed
    decays = (to.unsqueeze(2) - since.unsqueeze(1)).clamp(max=0.0).exp()
    return (x.unsqueeze(2) * decays * y.unsqueeze(1)).sum(-1) * allowed


def _masks(size: int, device: torch.device, *, removal: bool) -> list[Tensor]:
    """Which pairs (t, s) of a chunk are allowed: s up to t; with removal also s before t, and for `_inverse` (levels, size, size) the
    pairs of neighbouring blocks of 1, 2, 4, ... tokens.
    """
    t = torch.arange(size, device=device)
    later = (t.unsqueeze(1) >= t).float()
    if not removal:
        return [later]
    doublings = max(size - 1, 1).bit_length()
    block = torch.stack([t // 2**i for i in range(doublings + 1)])
    same = (block.unsqueeze(2) == block.unsqueeze(1)).float() * later
    return [later, (t.unsqueeze(1) > t).float(), same[1:] - same[:-1]]


def _inverse(strict: Tensor, levels: Tensor) -> Tensor:
    """(I - strict)^-1 for a strictly lower triangular matrix (batch * heads, size, size).

    With the inverses X of the diagonal blocks and E the part of `strict` between two neighbours, the inverse of the two together is
    X + X E X: blocks double until there is one. The product of (I + strict^(2^k)) needs as many matrix products, but powers of `strict`
    grow like binomial coefficients where keys repeat, to 5e17 for a chunk of 64, and cancel.
    """
    inverse = torch.eye(strict.shape[2], dtype=strict.dtype, device=strict.device) + strict * levels[0]
    for level in range(1, levels.shape[0]):
        inverse = inverse + torch.bmm(torch.bmm(inverse, strict * levels[level]), inverse)
    return inverse
