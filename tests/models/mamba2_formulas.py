"""Mamba-2's block in float64, one token after the other, for the tests of the architectures that have it."""

from __future__ import annotations

import numpy as np

from .mamba_formulas import linear, silu, softplus


def block(state, name, x, conv, S, *, groups, eps=1e-5):
    """The block on x (L, D), from conv (channels, W - 1) and S (H, N, P): its output (L, D), and the states after it."""
    heads, size, width = S.shape
    inner = heads * width
    ys = []
    for token in x:
        z, mixed, dt = np.split(linear(state, f"{name}.in_proj", token), [inner, 2 * inner + 2 * groups * size])
        window = np.concatenate([conv, mixed[:, None]], axis=1)
        conv = window[:, 1:]
        u, B, C = np.split(
            silu((window * state[f"{name}.conv1d.weight"][:, 0]).sum(1) + state[f"{name}.conv1d.bias"]), [inner, inner + groups * size]
        )
        u, B, C = u.reshape(heads, width), B.reshape(groups, size), C.reshape(groups, size)
        dt = softplus(dt + state[f"{name}.dt_bias"])
        S, y = S.copy(), np.zeros((heads, width))
        for head in range(heads):
            group = head // (heads // groups)
            S[head] = np.exp(-dt[head] * np.exp(state[f"{name}.A_log"][head])) * S[head] + np.outer(B[group], dt[head] * u[head])
            y[head] = C[group] @ S[head] + state[f"{name}.D"][head] * u[head]
        gated = (y.reshape(-1) * silu(z)).reshape(groups, -1)
        normal = gated / np.sqrt((gated**2).mean(1, keepdims=True) + eps)
        ys.append(linear(state, f"{name}.out_proj", normal.reshape(-1) * state[f"{name}.norm.weight"]))
    return np.stack(ys), conv, S
