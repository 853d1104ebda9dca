"""The matrix recurrence that linear attention and RWKV-7 share, solved chunk by chunk with matrix products.

For each batch and head, with the state S (key, value)::

    S_t = exp(g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
    y_t = S_t^T q_t

Within a chunk, with G_t the sum of g up to t and w_t = a_t^T S_{t-1}, the second line of the state is a triangular system in w::

    w_t = (a_t exp(G_{t-1}))^T S_0 + sum_{s<t} (a_t . exp(G_{t-1} - G_s) k_s) v_s + sum_{s<t} (a_t . exp(G_{t-1} - G_s) b_s) w_s

Every exponent is a sum of decays over a stretch of tokens, so that exp is at most 1 and nothing is divided: no decay is too long or too
steep. (The form that scales keys by exp(-G) overflows.) The delta rules are a = exp(g) k, b = -beta k, k = beta k. Sources: Yang et al.,
arXiv:2406.06484 and 2412.06464, for the triangular system; arXiv:2312.06635, section 4.3, for the exponents.
"""

from __future__ import annotations

import torch
from torch import Tensor

# With a decay for each key channel the exponents are (tokens, tokens, key) for each head: a short chunk bounds them.
_CHUNK = 64
_CHUNK_PER_KEY = 16


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor | None, b: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Solves the recurrence.

    Args:
        q: Queries (batch, heads, readers, length, key): several may read one state.
        k: Write keys (batch, heads, length, key).
        v: Values (batch, heads, length, value).
        g: Logarithms of the decay, (batch, heads, length, 1 or key), or None for no decay.
        a: Removal keys (batch, heads, length, key), or None for no removal.
        b: What is written back for them (batch, heads, length, key), or None.
        state: Initial state (batch, heads, key, value); not changed.

    Returns:
        y (batch, heads, readers, length, value) and the last state, in the dtype of the inputs.
    """
    size = _CHUNK_PER_KEY if g is not None and g.shape[3] > 1 else _CHUNK
    outputs = []
    for start in range(0, k.shape[2], size):
        k_c, v_c, g_c, a_c, b_c = (None if x is None else x[:, :, start : start + size] for x in (k, v, g, a, b))
        assert k_c is not None
        assert v_c is not None
        y, state = _chunk(q[:, :, :, start : start + size], k_c, v_c, g_c, a_c, b_c, state)
        outputs.append(y)
    return torch.cat(outputs, dim=3), state


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor | None, b: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    tokens = k.shape[2]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    if g is None:
        through = before = torch.zeros_like(k[..., :1])
    else:
        through = g.cumsum(2)
        before = torch.cat([torch.zeros_like(g[:, :, :1]), through[:, :, :-1]], dim=2)
    remains = (through[:, :, -1:] - through).exp()
    last = through[:, :, -1:].transpose(2, 3).exp() * state + (k * remains).transpose(2, 3) @ v
    w = None
    if a is not None and b is not None:
        earlier = later.tril(-1)
        known = (a * before.exp()) @ state + _weights(a, k, before, through, earlier) @ v
        system = torch.eye(tokens, dtype=q.dtype, device=q.device) - _weights(a, b, before, through, earlier)
        w = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
        last = last + (b * remains).transpose(2, 3) @ w
    ys = []
    for reader in q.unbind(2):
        y = (reader * through.exp()) @ state + _weights(reader, k, through, through, later) @ v
        if b is not None and w is not None:
            y = y + _weights(reader, b, through, through, later) @ w
        ys.append(y)
    return torch.stack(ys, dim=2), last


def _weights(x: Tensor, y: Tensor, to: Tensor, since: Tensor, allowed: Tensor) -> Tensor:
    """x_t . exp(to_t - since_s) y_s for the pairs (t, s) that are allowed, else 0: (batch, heads, tokens, tokens)."""
    # The exponents of other pairs may be positive and large: they are cut before exp, not after.
    exponents = (to.unsqueeze(3) - since.unsqueeze(2)).masked_fill(~allowed[:, :, None], -torch.inf)
    if exponents.shape[-1] == 1:
        return (x @ y.transpose(2, 3)) * exponents.squeeze(-1).exp()
    return torch.einsum("bhtk,bhtsk,bhsk->bhts", x, exponents.exp(), y)
