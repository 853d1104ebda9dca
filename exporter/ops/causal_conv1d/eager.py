"""The torch operator `isthmus::causal_conv1d`: its kernel, and the single step of a stream."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...op import OPS
from ..native.torch_hook import with_native
from ..torch_library import define, wide


def _compute(inputs: dict[str, Tensor], attributes: dict[str, Any]) -> tuple[Tensor, ...]:
    """The depthwise convolution of torch over the carry and the inputs."""
    x, weight = inputs["x"], inputs["weight"]
    dtype, width = wide(x.dtype), weight.shape[2]
    carry = inputs["initial_state"] if "initial_state" in inputs else x.new_zeros(*x.shape[:2], width - 1)
    padded = torch.cat([carry.to(x.dtype), x], dim=2)
    bias = inputs["bias"].to(dtype) if "bias" in inputs else None
    y = F.conv1d(padded.to(dtype), weight.to(dtype), bias, groups=x.shape[1])
    if attributes["silu"]:
        y = F.silu(y)
    return y.to(x.dtype), padded[:, :, x.shape[2] :].clone()


causal_conv1d = define(OPS["causal_conv1d"], with_native(OPS["causal_conv1d"], _compute))
"""`torch.ops.isthmus.causal_conv1d`; arguments, shapes and formulas as in the operator's schema."""


def causal_conv1d_step(
    x: Tensor, weight: Tensor, state: Tensor, *, bias: Tensor | None = None, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """One token of a stream, in plain torch operators, which every target compiles as they are.

    Args:
        x: Input (batch, channels).
        weight: Weight (channels, 1, width).
        state: The width - 1 inputs before it (batch, channels, width - 1).
        bias: Bias (channels,).
        silu: Whether SiLU is applied.

    Returns:
        y (batch, channels) and the state after the token, in the dtype of x.
    """
    dtype = wide(x.dtype)
    window = torch.cat([state.to(x.dtype), x.unsqueeze(-1)], dim=2)
    y = (window.to(dtype) * weight.squeeze(1).to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype), window[:, :, 1:]
