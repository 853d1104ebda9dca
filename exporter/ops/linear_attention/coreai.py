"""Linear attention for Core AI: chunks of tokens with matrix products inside them, in a loop; see `exporter.ops.coreai_recurrence`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..coreai_recurrence import scan


def decompose(inputs: dict[str, Tensor], attributes: dict[str, Any]) -> tuple[Tensor, ...]:
    """The operator in ATen operators and a loop; see `exporter.ops.coreai_table`."""
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    heads, rule = attributes["kv_num_heads"], attributes["update_rule"]
    batch, length = k.shape[:2]
    key, value = k.shape[2] // heads, v.shape[2] // heads
    sequences = {"q": q, "k": k, "v": v}
    if "gated" in rule:
        sequences["g"] = inputs["decay"]
    if "delta" in rule:
        per_head = k.float().reshape(batch, length, heads, key)
        beta = inputs["beta"].float().unsqueeze(-1)  # (batch, length, heads or 1, 1)
        removal = per_head
        if "gated" in rule:
            removal = per_head * inputs["decay"].float().reshape(batch, length, heads, -1).exp()
        written = beta * per_head
        sequences |= {name: x.reshape(k.shape) for name, x in (("k", written), ("a", removal), ("b", -written))}
    state = inputs.get("initial_state")
    state = k.new_zeros(batch, heads, key, value, dtype=torch.float32) if state is None else state.float()
    return scan(sequences, state, repeats=attributes["q_num_heads"] // heads, scale=attributes["scale"] or key**-0.5)
