"""The selective scan for Core AI: two levels, a loop over chunks and doubling steps of log-decays in each chunk.

After the step of stride k, token t holds the input and the logarithm of the decay of its last 2 k tokens. What is carried is the logarithm,
delta A, never exp(delta A): decays near 1 are not numbers of float16, and a product of many of them loses what the sum keeps. States and
steps are float32 whatever the activations are; Core AI's CPU executes them so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..coreai_chunks import scan_chunks

_CHUNK = 16


def decompose(inputs: dict[str, Tensor], attributes: dict[str, Any]) -> tuple[Tensor, ...]:
    """The operator in ATen operators and a loop; see `exporter.ops.coreai_table`."""
    u, delta, A, B, C = (inputs[name] for name in ("u", "delta", "A", "B", "C"))
    delta = delta.float()
    if "delta_bias" in inputs:
        delta = delta + inputs["delta_bias"].float()
    if attributes["delta_softplus"]:
        delta = _softplus(delta)
    sequences = [x.flip(1) if attributes["reverse"] else x for x in (u, delta, B, C)]
    state = inputs.get("initial_state")
    if state is None:
        state = u.new_zeros(u.shape[0], *A.shape, dtype=torch.float32)
    y, last = scan_chunks(_chunk, sequences, state.float(), [A.float()], size=_CHUNK, width=u.shape[2])
    if attributes["reverse"]:
        y = y.flip(1)
    if "D" in inputs or "z" in inputs:
        y = y.float()
    if "D" in inputs:
        y = y + u.float() * inputs["D"].float()
    if "z" in inputs:
        y = y * F.silu(inputs["z"].float())
    return y.to(u.dtype), last


def _chunk(chunk: Sequence[Tensor], state: Tensor, constants: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    u, delta, B, C = (x.float() for x in chunk)
    (A,) = constants
    B, C = (_spread(x, u.shape[2], A.shape[1]) for x in (B, C))
    log_decay = delta.unsqueeze(-1) * A  # (batch, tokens, channels, state)
    h = (delta * u).unsqueeze(-1) * B
    stride, tokens = 1, u.shape[1]
    while stride < tokens:
        earlier = (0, 0, 0, 0, stride, 0)  # shifts tokens to the right
        h = h + log_decay.exp() * F.pad(h[:, :-stride], earlier)
        log_decay = log_decay + F.pad(log_decay[:, :-stride], earlier)
        stride *= 2
    h = h + log_decay.exp() * state.unsqueeze(1)
    return (h * C).sum(-1), h[:, -1]


def _spread(x: Tensor, channels: int, state: int) -> Tensor:
    """(batch, tokens, groups * state) to (batch, tokens, channels or 1, state): every channel's matrix."""
    groups = x.shape[2] // state
    x = x.reshape(*x.shape[:2], groups, 1, state)
    if groups == 1:
        return x.squeeze(2)
    return x.expand(-1, -1, -1, channels // groups, -1).reshape(*x.shape[:2], channels, state)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) to full relative precision in every dtype.

    exp(x) overflows float16 past x = 11 (coreai-torch issue 103), and Core AI computes log1p(e) as log(1 + e), which keeps some three
    digits of a step of 1e-4. Here e = exp(-|x|) is at most 1, w = e / (2 + e) at most 1/3, and log(1 + e) = 2 atanh(w) is its series up
    to w^15, whose remainder is below 2e-9 of the whole.
    """
    e = torch.exp(-x.abs())
    w = e / (e + 2.0)
    square = w * w
    series = torch.full_like(w, 1.0 / 15.0)
    for k in range(13, 0, -2):
        series = series * square + 1.0 / k
    return x.clamp(min=0.0) + 2.0 * w * series
