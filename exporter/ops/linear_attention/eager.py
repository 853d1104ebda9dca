"""The torch operator `isthmus::linear_attention`: its kernel, and the single step of a stream."""

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
    heads, rule, q = attributes["kv_num_heads"], attributes["update_rule"], inputs["q"]
    repeats, dtype = attributes["q_num_heads"] // heads, wide(q.dtype)
    given = {name: x.to(dtype) for name, x in inputs.items()}
    k, v = (split(given[name], heads).transpose(1, 2) for name in ("k", "v"))  # (batch, heads, length, width)
    q = split(given["q"], heads * repeats).transpose(1, 2).reshape(q.shape[0], heads, repeats, q.shape[1], -1)
    scale = attributes["scale"] or k.shape[-1] ** -0.5
    g = split(given["decay"], heads).transpose(1, 2) if "gated" in rule else None
    a = b = None
    if "delta" in rule:
        beta = given["beta"].transpose(1, 2).unsqueeze(-1)  # (batch, heads or 1, length, 1)
        a, b = k if g is None else k * g.exp(), -beta * k
        k = beta * k
    state = given.get("initial_state")
    if state is None:
        state = v.new_zeros(v.shape[0], heads, k.shape[-1], v.shape[-1])
    y, last = chunked(q, k, v, g, a, b, state)
    y = (y * scale).flatten(1, 2).transpose(1, 2).flatten(2)
    return y.to(inputs["q"].dtype).contiguous(), last.contiguous()


linear_attention = define(OPS["linear_attention"], with_native(OPS["linear_attention"], _compute))
"""`torch.ops.isthmus.linear_attention`; arguments, shapes and formulas as in the operator's schema."""


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One token of a stream, in plain torch operators, which every target compiles as they are. The rule follows from decay and beta.

    Args:
        q: Queries (batch, q_num_heads * key).
        k: Keys (batch, kv_num_heads * key).
        v: Values (batch, kv_num_heads * value).
        state: State before the token (batch, kv_num_heads, key, value), float32 at least.
        decay: Logarithm of the decay (batch, kv_num_heads) or (batch, kv_num_heads * key).
        beta: Update rate (batch, kv_num_heads) or (batch, 1).
        q_num_heads: Heads of q.
        kv_num_heads: Heads of k and v.
        scale: Factor of y; 0 stands for 1 / sqrt(key).

    Returns:
        y (batch, q_num_heads * value) in the dtype of q, and the state after the token.
    """
    dtype, repeats = wide(q.dtype), q_num_heads // kv_num_heads
    k, v = (split(x.to(dtype), kv_num_heads) for x in (k, v))
    queries = split(q.to(dtype), q_num_heads)
    state = state.to(dtype)
    if decay is not None:
        state = torch.exp(split(decay.to(dtype), kv_num_heads)).unsqueeze(-1) * state
    if beta is not None:
        v = beta.to(dtype).unsqueeze(-1) * (v - read(state, k))
    state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
    # One axis less where heads are not grouped: Core ML has five at most.
    y = read(state, queries) if repeats == 1 else read(state.unsqueeze(2), queries.reshape(len(q), kv_num_heads, repeats, -1))
    return (y * (scale or k.shape[-1] ** -0.5)).flatten(1).to(q.dtype), state
