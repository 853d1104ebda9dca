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
    sequences = [_reversed(x) if attributes["reverse"] else x for x in (u, delta, B, C)]
    state = inputs.get("initial_state")
    if state is None:
        state = u.new_zeros(u.shape[0], *A.shape, dtype=torch.float32)
    y, last = scan_chunks(_chunk, sequences, state.float(), [A.float()], size=_CHUNK, width=u.shape[2])
    if attributes["reverse"]:
        y = _reversed(y)
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
        h = h + log_decay.exp() * _earlier(h, stride)
        log_decay = log_decay + _earlier(log_decay, stride)
        stride *= 2
    h = h + log_decay.exp() * state.unsqueeze(1)
    return (h * C).sum(-1), h[:, -1]


def _reversed(x: Tensor) -> Tensor:
    """The tokens from last to first: `flip`, which takes coreai-core 1.0.0b3 on a CPU eight times as long."""
    return x.index_select(1, torch.arange(x.shape[1], device=x.device) * -1 + (x.shape[1] - 1))


def _earlier(x: Tensor, stride: int) -> Tensor:
    """Every token's predecessor at a distance, and zeros for the first ones: (batch, tokens, channels, state).

    A product with a matrix of zeros and ones is exact, and in coreai-core 1.0.0b3 on a CPU a hundred times as fast as padding.
    """
    batch, tokens = x.shape[:2]
    at = torch.arange(tokens, device=x.device)
    matrix = (at.unsqueeze(1) - stride == at).to(x.dtype)
    # A sum and no `expand`, which coreai-torch 0.4.3 takes for a reshape where the batch is dynamic.
    return torch.bmm(x.new_zeros(batch, 1, 1) + matrix, x.flatten(2)).reshape(x.shape)


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
