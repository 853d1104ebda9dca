"""The causal convolution in standard ONNX operators: a Scan over the taps, each a shifted copy of the inputs times its weight.

A `Conv` would need the number of channels as its `group`, an attribute, which a function body cannot take from a shape. `CONTRIB` is ONNX
Runtime's own operator; its CPU kernel takes float32 only, and its activation is a text, which an attribute that is a number cannot become.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SILU = """
  silu_int = Constant <value_int: int = @silu> ()
  is_silu = Cast <to: int = 9> (silu_int)
  sigmoid = Sigmoid (linear)
  swish = Mul (linear, sigmoid)
  y32 = Where (is_silu, swish, linear)
  y = CastLike (y32, x)
"""

BODIES = {
    "CausalConv1d": f"""
  one = Constant <value_ints: ints = [1]> ()
  two = Constant <value_ints: ints = [2]> ()
  far = Constant <value_ints: ints = [9223372036854775807]> ()
  length = Shape <start: int = 2, end: int = 3> (x)
  padded = Concat <axis: int = 2> (initial_state, x)
  last_state = Slice (padded, length, far, two)
  inputs = Cast <to: int = 1> (padded)
  weights = Cast <to: int = 1> (weight)
  bias32 = Cast <to: int = 1> (bias)
  bias_column = Unsqueeze (bias32, one)
  width = Shape <start: int = 2, end: int = 3> (weight)
  first = Constant <value_int: int = 0> ()
  increment = Constant <value_int: int = 1> ()
  limit = Squeeze (width)
  taps = Range (first, limit, increment)
  x_shape = Shape (x)
  sum_0 = Expand (bias_column, x_shape)
  linear = Scan <
    num_scan_inputs: int = 2,
    scan_input_axes: ints = [0, 2],
    body: graph = add_tap (float[] sum, int64 tap, float[] weight_tap) => (float[] sum_tap) {{
      start = Reshape (tap, one)
      end = Add (start, length)
      shifted = Slice (inputs, start, end, two)
      product = Mul (shifted, weight_tap)
      sum_tap = Add (sum, product)
    }}
  > (sum_0, taps, weights)
{_SILU}"""
}

CONTRIB = {
    "CausalConv1d": f"""
  x32 = Cast <to: int = 1> (x)
  weight32 = Cast <to: int = 1> (weight)
  bias32 = Cast <to: int = 1> (bias)
  initial32 = Cast <to: int = 1> (initial_state)
  linear, last32 = com.microsoft.CausalConvWithState <activation: string = "none"> (x32, weight32, bias32, initial32)
  last_state = CastLike (last32, x)
{_SILU}"""
}


def specialised(op_type: str, attributes: Mapping[str, Any], shapes: Mapping[str, Sequence[int | str | None] | None]) -> str:
    """The body of one node, for graphs without functions: a `Conv` where the number of channels and the width are static."""
    channels, _, width = shapes["weight"] or (None, None, None)
    if not isinstance(channels, int) or not isinstance(width, int):
        return BODIES[op_type]
    silu = "sigmoid = Sigmoid (linear)\n  y32 = Mul (linear, sigmoid)" if attributes["silu"] else "y32 = Identity (linear)"
    return f"""
  first = Constant <value_ints: ints = [{1 - width}]> ()
  far = Constant <value_ints: ints = [9223372036854775807]> ()
  axis = Constant <value_ints: ints = [2]> ()
  padded = Concat <axis: int = 2> (initial_state, x)
  last_state = Slice (padded, first, far, axis)
  padded32 = Cast <to: int = 1> (padded)
  weight32 = Cast <to: int = 1> (weight)
  bias32 = Cast <to: int = 1> (bias)
  linear = Conv <group: int = {channels}> (padded32, weight32, bias32)
  {silu}
  y = CastLike (y32, x)
"""
