"""Normalisations, in forms that hold in float16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder
from torch import Tensor

from . import decomposition, lowering

aten = torch.ops.aten
mb: Any = Builder

_SINGLE = float(np.finfo(np.float32).eps)


@lowering(aten.rms_norm.default)
def rms_norm(x: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """The quotient x / sqrt(mean(x^2) + eps), times the weight.

    coremltools divides by the largest magnitude, so that a row of zeros is not a number, and adds eps after that; torch's decomposition
    squares, which leaves float16 past 255. Here s = max(|x|, sqrt(eps)) is taken out of both: with y = x / s and t = sqrt(eps) / s, which
    are 1 at most, the result is y / sqrt(mean(y^2) + t^2).

    eps is that of float32 where none is given, as in torch.
    """
    axes = list(range(-len(normalized_shape), 0))
    root = math.sqrt(_SINGLE if eps is None else eps)
    floor = max(root, 1e-7)  # with eps = 0 a row of zeros is a quotient of zeros in torch; here it is zeros
    size = mb.maximum(x=mb.reduce_max(x=mb.abs(x=x), axes=axes, keep_dims=True), y=np.float32(floor))
    y = mb.real_div(x=x, y=size)
    square = mb.reduce_mean(x=mb.mul(x=y, y=y), axes=axes, keep_dims=True)
    if root:
        share = mb.real_div(x=np.float32(root), y=size)
        square = mb.add(x=square, y=mb.mul(x=share, y=share))
    y = mb.mul(x=y, y=mb.rsqrt(x=square, epsilon=np.float32(1e-7 if not root else 0.0)))
    return y if weight is None else mb.mul(x=y, y=weight)


@lowering(aten.layer_norm.default)
def layer_norm(
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001 - as ATen's
) -> Any:
    """As coremltools wants a weight where there is a bias, and constants for both, as MIL does."""
    axes = list(range(-len(normalized_shape), 0))
    constant = [None if p is None or p.val is None else p for p in (weight, bias)]
    gamma = constant[0]
    beta = constant[1] if gamma is not None or weight is None else None
    if beta is not None and gamma is None:
        gamma = np.ones([int(size) for size in normalized_shape], np.float32)
    y = mb.layer_norm(x=x, axes=axes, gamma=gamma, beta=beta, epsilon=np.float32(eps))
    if weight is not None and constant[0] is None:
        y = mb.mul(x=y, y=weight)
    return y if bias is None or beta is not None else mb.add(x=y, y=bias)


@lowering(aten.group_norm.default)
def group_norm(x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True) -> Any:  # noqa: ARG001 - as ATen's
    """One `layer_norm` over each group: coremltools writes out mean and variance, whose squares leave float16 past 255."""
    if all(isinstance(size, int | np.integer) for size in x.shape):
        shape, rows = [int(size) for size in x.shape], [int(x.shape[0]), num_groups, -1]
    else:
        shape = mb.shape(x=x)
        rows = mb.concat(values=[mb.slice_by_size(x=shape, begin=[0], size=[1]), np.array([num_groups, -1], np.int32)], axis=0)
    y = mb.layer_norm(x=mb.reshape(x=x, shape=rows), axes=[2], epsilon=np.float32(eps))
    y = mb.reshape(x=y, shape=shape)
    for parameter, apply in ((weight, mb.mul), (bias, mb.add)):
        if parameter is not None:
            y = apply(x=y, y=mb.reshape(x=parameter, shape=[-1] + [1] * (x.rank - 2)))
    return y


@decomposition(aten.instance_norm.default)
def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    *rest: Any,
) -> Any:
    """As coremltools takes the moments of the input where those that were kept are asked for."""
    if use_input_stats:
        return NotImplemented
    eps = rest[1]
    shape = [-1] + [1] * (x.dim() - 2)
    assert running_mean is not None
    assert running_var is not None
    y = (x - running_mean.reshape(shape)) * torch.rsqrt(running_var + eps).reshape(shape)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)
