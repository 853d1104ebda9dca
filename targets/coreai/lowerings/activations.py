"""Activations that overflow float16, or that the converter lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import lowering

aten = torch.ops.aten


@lowering(aten.softplus.default)
def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + exp(beta x)) / beta, and x itself past the threshold.

    torch's decomposition takes exp(x), which overflows float16 past x = 11 (coreai-torch issue 103), and its logarithm of 1 + exp(x)
    has no digits of a very negative x.
    """
    scaled = x * beta
    smooth = (scaled.clamp(min=0.0) + torch.log1p(torch.exp(-scaled.abs()))) / beta
    return torch.where(scaled > threshold, x, smooth)


@lowering(aten.rrelu_with_noise_functional.default)
def rrelu(x: Tensor, noise: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: Any) -> Any:
    """In eval mode a leaky ReLU with the mean slope."""
    if training:
        return NotImplemented
    return torch.nn.functional.leaky_relu(x, (lower + upper) / 2), noise
