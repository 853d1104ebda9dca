"""The causal convolution for Core AI: a depthwise convolution of the carry and the inputs, in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def decompose(inputs: dict[str, Tensor], attributes: dict[str, Any]) -> tuple[Tensor, ...]:
    """The operator in ATen operators; see `exporter.ops.coreai_table`."""
    x, weight = inputs["x"], inputs["weight"]
    carry = weight.shape[2] - 1
    state = inputs.get("initial_state")
    padded = F.pad(x, (carry, 0)) if state is None else torch.cat([state.to(x.dtype), x], dim=2)
    bias = inputs["bias"].float() if "bias" in inputs else None
    y = F.conv1d(padded.float(), weight.float(), bias, groups=x.shape[1])
    if attributes["silu"]:
        y = F.silu(y)
    return y.to(x.dtype), padded[:, :, x.shape[2] :]
