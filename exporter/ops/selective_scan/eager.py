"""The torch operator `isthmus::selective_scan`: its kernel, and the single step of a stream."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...op import OPS
from ..native.torch_hook import with_native
from ..torch_library import define, split, wide

_CHUNK = 64


def _compute(inputs: dict[str, Tensor], attributes: dict[str, Any]) -> tuple[Tensor, ...]:
    """Chunks of 64 tokens, each solved in log2(64) doubling steps (Hillis and Steele, 1986); memory for states is that of one chunk.

    After the step of stride k, token t holds the decay and the input of the last 2 k tokens. Nothing is divided by a decay, and a product
    of decays is at most 1, so that it cannot overflow.
    """
    u, A = inputs["u"], inputs["A"]
    dtype, (batch, length, channels) = wide(u.dtype), u.shape
    given = {name: x.to(dtype) for name, x in inputs.items()}
    if attributes["reverse"]:
        given |= {name: given[name].flip(1) for name in ("u", "delta", "B", "C", "z") if name in given}
    delta = _delta(given, attributes)
    groups = given["B"].shape[2] // A.shape[1]
    state = given.get("initial_state")
    if state is None:
        state = given["u"].new_zeros(batch, channels, A.shape[1])
    ys = []
    for start in range(0, length, _CHUNK):
        u_c, delta_c, B_c, C_c = (x[:, start : start + _CHUNK] for x in (given["u"], delta, given["B"], given["C"]))
        B_c, C_c = (_spread(x, groups, channels) for x in (B_c, C_c))
        decay = torch.exp(delta_c.unsqueeze(-1) * given["A"])  # (batch, tokens, channels, state)
        h = (delta_c * u_c).unsqueeze(-1) * B_c
        h[:, 0] += decay[:, 0] * state
        stride, tokens = 1, h.shape[1]
        while stride < tokens:
            earlier = (0, 0, 0, 0, stride, 0)  # shifts tokens to the right
            h = h + decay * F.pad(h[:, :-stride], earlier)
            decay = decay * F.pad(decay[:, :-stride], earlier)
            stride *= 2
        state = h[:, -1]
        ys.append((h * C_c).sum(-1))
    y = torch.cat(ys, dim=1)
    if "D" in given:
        y = y + given["u"] * given["D"]
    if "z" in given:
        y = y * F.silu(given["z"])
    if attributes["reverse"]:
        y = y.flip(1)
    return y.to(u.dtype), state.contiguous()


def _delta(given: dict[str, Tensor], attributes: dict[str, Any]) -> Tensor:
    delta = given["delta"]
    if "delta_bias" in given:
        delta = delta + given["delta_bias"]
    return F.softplus(delta) if attributes["delta_softplus"] else delta


def _spread(x: Tensor, groups: int, channels: int) -> Tensor:
    """(..., groups * state) to (..., channels or 1, state): every channel's matrix."""
    x = split(x, groups)
    return x if groups == 1 else x.repeat_interleave(channels // groups, dim=-2)


selective_scan = define(OPS["selective_scan"], with_native(OPS["selective_scan"], _compute))
"""`torch.ops.isthmus.selective_scan`; arguments, shapes and formulas as in the operator's schema."""


def selective_scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of a stream, in plain torch operators, which every target compiles as they are.

    Args:
        u: Input (batch, channels).
        delta: Step (batch, channels).
        A: Decay (channels, state).
        B: Input matrix (batch, groups * state).
        C: Output matrix (batch, groups * state).
        state: State before the token (batch, channels, state), float32 at least.
        D: Skip (channels,).
        z: Gate (batch, channels).
        delta_bias: Added to delta (channels,).
        delta_softplus: Whether softplus is applied to delta then.

    Returns:
        y (batch, channels) in the dtype of u, and the state after the token.
    """
    dtype, channels = wide(u.dtype), u.shape[-1]
    groups = B.shape[-1] // A.shape[-1]
    step = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)
    step = (F.softplus(step) if delta_softplus else step).unsqueeze(-1)
    B, C = (_spread(x.to(dtype), groups, channels) for x in (B, C))
    state = torch.exp(step * A.to(dtype)) * state.to(dtype) + step * u.to(dtype).unsqueeze(-1) * B
    y = (state * C).sum(-1)
    if D is not None:
        y = y + u.to(dtype) * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state
