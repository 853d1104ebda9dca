"""Causal linear attention as the standard's `LinearAttention`, which it was modelled after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .onnx_function import optional_inputs


def body(op_type: str, attributes: Mapping[str, Any], shapes: Mapping[str, Any]) -> str:
    """The body of one node, of opset 27. Activations keep their dtype, the state is float32."""
    return f"""
  y, last_state = LinearAttention <
    q_num_heads: int = @q_num_heads,
    kv_num_heads: int = @kv_num_heads,
    update_rule: string = @update_rule,
    scale: float = @scale
  > (q, k, v, initial_state{optional_inputs(attributes["update_rule"])})
"""
