"""Attention, which stays one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....exporter.masked_attention import guarded_attention
from . import lowering

aten = torch.ops.aten


@lowering(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **rest: Any,
) -> Any:
    """coreai-torch masks with -10000, so that a query that may read no key averages all of them; see `guarded_attention`."""
    return guarded_attention(query, key, value, attn_mask, dropout_p, is_causal, **rest)
