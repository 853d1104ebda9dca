"""Mamba-1's block in float64, one token after the other, for the tests of the architectures that have it."""

from __future__ import annotations

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def rms_norm(state, name, x, eps=1e-5):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * state[f"{name}.weight"]


def layer_norm(state, name, x, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def scan_stream(state, name, tokens, gates, conv, h, names=("conv1d", "x_proj", "dt_proj", "A_log", "D")):
    """Convolution, selection, scan and gate over `tokens` and `gates` (L, E), from conv (E, W - 1) and h (E, N): y, conv, h."""
    conv1d, x_proj, dt_proj, a_log, skip = (f"{name}.{part}" for part in names)
    A = -np.exp(state[a_log])
    size, rank = A.shape[1], state[f"{dt_proj}.weight"].shape[1]
    ys = []
    for token, gate in zip(tokens, gates, strict=True):
        window = np.concatenate([conv, token[:, None]], axis=1)
        u = silu((window * state[f"{conv1d}.weight"][:, 0]).sum(1) + state[f"{conv1d}.bias"])
        conv = window[:, 1:]
        dt, B, C = np.split(linear(state, x_proj, u), [rank, rank + size])
        delta = softplus(linear(state, dt_proj, dt))
        h = np.exp(delta[:, None] * A) * h + np.outer(delta * u, B)
        ys.append((h @ C + state[skip] * u) * silu(gate))
    return np.stack(ys), conv, h


def block(state, name, x, conv, h):
    """The whole block on x (L, D): its output (L, D), and the states after it."""
    stream, gate = np.split(linear(state, f"{name}.in_proj", x), 2, axis=-1)
    y, conv, h = scan_stream(state, name, stream, gate, conv, h)
    return linear(state, f"{name}.out_proj", y), conv, h
