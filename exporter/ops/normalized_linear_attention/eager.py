"""The torch operator `isthmus::normalized_linear_attention`. It is not causal, so that a stream has no single step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...op import OPS
from ..native.torch_hook import with_native
from ..torch_library import define, split, wide


def _compute(inputs: dict[str, Tensor], attributes: dict[str, Any]) -> tuple[Tensor, ...]:
    """The linear form: keys and values are summed into one matrix a head first."""
    heads, dtype = attributes["num_heads"], wide(inputs["q"].dtype)
    q, k, v = (split(inputs[name].to(dtype), heads).transpose(1, 2) for name in ("q", "k", "v"))
    q, k = q.relu(), k.relu()
    y = (q @ (k.transpose(2, 3) @ v)) / (q @ k.sum(2).unsqueeze(-1) + attributes["eps"])
    return (y.transpose(1, 2).flatten(2).to(inputs["q"].dtype).contiguous(),)


normalized_linear_attention = define(OPS["normalized_linear_attention"], with_native(OPS["normalized_linear_attention"], _compute))
"""`torch.ops.isthmus.normalized_linear_attention`; arguments, shapes and formulas as in the operator's schema."""
