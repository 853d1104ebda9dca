"""The operator of the layout that PyTorch lacks, and its lowering: a layer norm over any axis.

coremltools makes a `layer_norm` over axis 1 of the ten operations that ml-ane-transformers writes for it, but for certain neighbours and
certain orders of its passes only (`fuse_layernorm_or_instancenorm`, pattern 5); the squares that it leaves otherwise are infinite in
float16 past 255. As one operator, a norm is one operation always.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("isthmus_coreml::layer_norm_along", mutates_args=())
def _layer_norm_along(x: Tensor, dim: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias along one axis, of whose size weight and bias are vectors."""
    y = torch.nn.functional.layer_norm(x.movedim(dim, -1), (x.shape[dim],), weight, bias, eps)
    return y.movedim(-1, dim).contiguous()


@_layer_norm_along.register_fake
def _(x: Tensor, dim: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:  # noqa: ARG001 - the operator's
    return x.new_empty(x.shape)


NAMESPACE = "isthmus_coreml"

layer_norm_along = torch.ops.isthmus_coreml.layer_norm_along.default


def register() -> None:
    """Hands the lowering to coremltools; calling it again changes nothing."""
    from ..lowerings.binding import install

    install({layer_norm_along: _lowered})


def _lowered(x: Any, dim: int, weight: Any, bias: Any, eps: float) -> Any:
    """Weight and bias are stored in the package: others stand outside (`layer_norm`)."""
    import numpy as np
    from coremltools.converters.mil import Builder

    gamma = np.ones(int(x.shape[dim]), np.float32) if weight is None and bias is not None else weight  # MIL takes no bias alone
    return Builder.layer_norm(x=x, axes=[dim], gamma=gamma, beta=bias, epsilon=np.float32(eps))
