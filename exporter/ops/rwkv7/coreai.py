"""RWKV-7's time mixing for Core AI: chunks of tokens with matrix products inside them, in a loop; see `exporter.ops.coreai_recurrence`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..coreai_recurrence import scan


def decompose(inputs: dict[str, Tensor], attributes: dict[str, Any]) -> tuple[Tensor, ...]:
    """The operator in ATen operators and a loop; see `exporter.ops.coreai_table`."""
    k, v, heads = inputs["k"], inputs["v"], attributes["num_heads"]
    state = inputs.get("initial_state")
    if state is None:
        state = k.new_zeros(k.shape[0], heads, k.shape[2] // heads, v.shape[2] // heads, dtype=torch.float32)
    sequences = {"q": inputs["r"], "k": k, "v": v, "g": inputs["decay"], "a": inputs["a"], "b": inputs["b"]}
    return scan(sequences, state.float(), repeats=1, scale=1.0)
