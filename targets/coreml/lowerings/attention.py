"""Attention, which stays one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....exporter.masked_attention import guarded_attention
from . import decomposition

aten = torch.ops.aten


@decomposition(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """As coremltools drops `enable_gqa`: heads of keys and values that several of the queries share are repeated.

    A query that may read no key is not a number in Core ML; see `guarded_attention`.
    """
    if not enable_gqa or query.shape[-3] == key.shape[-3] == value.shape[-3]:
        return guarded_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
