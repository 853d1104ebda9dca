"""The causal convolution as the standard's `CausalConvWithState`, which it was modelled after.

In float32 between casts: the standard does not say that the sum is not rounded to float16 before SiLU, and onnx.reference does round it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def body(op_type: str, attributes: Mapping[str, Any], shapes: Mapping[str, Any]) -> str:
    """The body of one node, of opset 27."""
    activation = "silu" if attributes["silu"] else "none"
    return f"""
  x32 = Cast <to: int = 1> (x)
  weight32 = Cast <to: int = 1> (weight)
  bias32 = Cast <to: int = 1> (bias)
  initial32 = Cast <to: int = 1> (initial_state)
  y32, last32 = CausalConvWithState <activation: string = "{activation}"> (x32, weight32, bias32, initial32)
  y = CastLike (y32, x)
  last_state = CastLike (last32, x)
"""
