"""The torch operator `isthmus::rwkv7`: its kernel, and the single step of a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...op import OPS
from ..native.torch_hook import with_native
from ..recurrence import chunked
from ..torch_library import define, read, split, wide


def _compute(inputs: dict[str, Tensor], attributes: dict[str, Any]) -> tuple[Tensor, ...]:
    """Chunks of tokens with matrix products inside them; see `exporter.ops.recurrence`."""
    heads, dtype = attributes["num_heads"], wide(inputs["r"].dtype)
    r, g, k, v, a, b = (split(inputs[name].to(dtype), heads).transpose(1, 2) for name in ("r", "decay", "k", "v", "a", "b"))
    state = inputs["initial_state"].to(dtype) if "initial_state" in inputs else v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
    y, last = chunked(r.unsqueeze(2), k, v, g, a, b, state)
    return y.squeeze(2).transpose(1, 2).flatten(2).to(inputs["r"].dtype).contiguous(), last.contiguous()


rwkv7 = define(OPS["rwkv7"], with_native(OPS["rwkv7"], _compute))
"""`torch.ops.isthmus.rwkv7`; arguments, shapes and formulas as in the operator's schema."""


def rwkv7_step(
    r: Tensor, decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, *, num_heads: int
) -> tuple[Tensor, Tensor]:
    """One token of a stream, in plain torch operators, which every target compiles as they are.

    Args:
        r: Receptance, which reads the state (batch, num_heads * key).
        decay: Logarithm of the decay (batch, num_heads * key).
        k: Write keys (batch, num_heads * key).
        v: Values (batch, num_heads * value).
        a: Removal keys (batch, num_heads * key).
        b: What is written back for them (batch, num_heads * key).
        state: State before the token (batch, num_heads, key, value), float32 at least.
        num_heads: The number of heads.

    Returns:
        y (batch, num_heads * value) in the dtype of r, and the state after the token.
    """
    dtype = wide(r.dtype)
    reads, g, k, v, a, b = (split(x.to(dtype), num_heads) for x in (r, decay, k, v, a, b))
    state = state.to(dtype)
    removed = read(state, a).unsqueeze(-2)  # (batch, heads, 1, value)
    state = torch.exp(g).unsqueeze(-1) * state + b.unsqueeze(-1) * removed + k.unsqueeze(-1) * v.unsqueeze(-2)
    return read(state, reads).flatten(1).to(r.dtype), state
