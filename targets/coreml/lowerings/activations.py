"""Activations."""

# Operators of torch.ops have no types.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from typing import Any

import torch
from coremltools.converters.mil import Builder
from torch import Tensor

from . import decomposition, lowering

aten = torch.ops.aten
mb: Any = Builder


@lowering(aten.gelu.default)
def gelu(x: Any, *, approximate: str = "none") -> Any:
    """As coremltools 9.0 reads `approximate` where it is positional; torch.export gives it as a keyword, and the form was the exact one."""
    return mb.gelu(x=x, mode="TANH_APPROXIMATION" if approximate == "tanh" else "EXACT")


@decomposition(aten.softplus.default)
def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """As coremltools drops `threshold`, and has no `beta` for images of three axes and more than one channel.

    log(1 + exp(x)) is x from 20 on, to float32's last digit.
    """
    if beta == 1.0 and threshold >= 20.0:
        return NotImplemented
    smooth = aten.softplus.default(x * beta) / beta
    return smooth if threshold >= 20.0 else torch.where(x * beta > threshold, x, smooth)


@decomposition(aten.log_sigmoid.default)
def log_sigmoid(x: Tensor) -> Tensor:
    """As coremltools has none; a logarithm of the sigmoid has no digits of a very negative x."""
    return -aten.softplus.default(-x)


@decomposition(aten.elu.default)
def elu(x: Tensor, alpha: Any = 1.0, scale: Any = 1.0, input_scale: Any = 1.0) -> Any:
    """As coremltools drops `scale` and `input_scale`, which SELU and CELU are made of."""
    if scale == 1 and input_scale == 1:
        return NotImplemented
    return torch.where(x > 0, x, aten.elu.default(x * input_scale, alpha)) * scale


@decomposition(aten.celu.default)
def celu(x: Tensor, alpha: Any = 1.0) -> Tensor:
    """As coremltools has none."""
    return elu(x, alpha, 1.0, 1.0 / alpha) if alpha != 1 else aten.elu.default(x)


@lowering(aten.prelu.default)
def prelu(x: Any, weight: Any) -> Any:
    """As coremltools takes one slope a channel for rank 4 alone, and constant slopes alone."""
    count = int(weight.shape[0]) if weight.shape else 1
    if x.rank == 4 and count > 1 and weight.val is not None:
        return NotImplemented
    slope = mb.reshape(x=weight, shape=[count] + [1] * (x.rank - 2) if x.rank > 1 else [count])
    return mb.add(x=mb.relu(x=x), y=mb.mul(x=slope, y=mb.minimum(x=x, y=0.0)))


@decomposition(aten.hardtanh.default)
def hardtanh(x: Tensor, low: Any = -1.0, high: Any = 1.0) -> Tensor:
    """As coremltools wants every argument."""
    return torch.clamp(x, low, high)


@decomposition(aten.softmax.int)
def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """As coremltools drops `dtype`."""
    return NotImplemented if dtype is None or dtype == x.dtype else torch.softmax(x.to(dtype), dim)


@decomposition(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """As coremltools takes the logarithm of the softmax, which is that of 0 for all but the largest few."""
    if isinstance(dtype, torch.dtype):
        x = x.to(dtype)
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


@decomposition(aten.glu.default)
def glu(x: Tensor, dim: int = -1) -> Tensor:
    """Two halves, the second of which gates the first."""
    a, b = x.chunk(2, dim)
    return a * b.sigmoid()
