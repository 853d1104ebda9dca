"""The selective scan in standard ONNX operators: a Scan over the tokens.

States are (batch, groups, channels of a group, state), so that B and C of a group broadcast over its channels and are never repeated.
The sum over the state is a product and a sum: TensorRT-RTX 1.7.1 fails on a MatMul in the Scan ("mismatched number of elements in
reshape op").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STEP = """
  softplus_int = Constant <value_int: int = @delta_softplus> ()
  is_softplus = Cast <to: int = 9> (softplus_int)
  softened = Softplus (biased)
  step = Where (is_softplus, softened, biased)
"""

# reverse = 0: from the first token to the last in steps of 1; reverse = 1: from the last to the first in steps of -1
_ORDER = """
  reverse_scalar = Constant <value_int: int = @reverse> ()
  reversed = Reshape (reverse_scalar, one)
  start = Neg (reversed)
  two = Constant <value_ints: ints = [2]> ()
  twice = Mul (reversed, two)
  stride = Sub (one, twice)
  far = Constant <value_ints: ints = [9223372036854775807]> ()
  end = Mul (stride, far)
"""


def _body(op_type: str, *, softplus: bool | None = None, reverse: bool | None = None) -> str:
    """The body of a form. What is not given is read from the node's attributes."""
    step = {None: _STEP, True: "  step = Softplus (biased)", False: "  step = Identity (biased)"}[softplus]
    order = "Slice ({}, start, end, one, stride)" if reverse is None else "Identity ({})"
    directions = (
        f"""
    scan_input_directions: ints = [{", ".join([str(int(reverse))] * 4)}],
    scan_output_directions: ints = [{int(reverse)}],"""
        if reverse is not None
        else ""
    )
    gate = """
  z32 = Cast <to: int = 1> (z)
  z_sigmoid = Sigmoid (z32)
  swish = Mul (z32, z_sigmoid)
  gated = Mul (y_skip, swish)
  y = CastLike (gated, u)
"""
    return f"""
  one = Constant <value_ints: ints = [1]> ()
  rest = Constant <value_ints: ints = [-1]> ()
  tokens = Shape <start: int = 0, end: int = 2> (u)
  batch = Shape <start: int = 0, end: int = 1> (u)
  state = Shape <start: int = 1, end: int = 2> (A)
  columns = Shape <start: int = 2, end: int = 3> (B)
  groups = Div (columns, state)

  u32 = Cast <to: int = 1> (u)
  delta32 = Cast <to: int = 1> (delta)
  biased = Add (delta32, delta_bias)
{step}
  drive = Mul (step, u32)
  B32 = Cast <to: int = 1> (B)
  C32 = Cast <to: int = 1> (C)
{_ORDER if reverse is None else ""}
  step_o = {order.format("step")}
  drive_o = {order.format("drive")}
  B_o = {order.format("B32")}
  C_o = {order.format("C32")}

  column_shape = Concat <axis: int = 0> (tokens, groups, rest, one)
  row_shape = Concat <axis: int = 0> (tokens, groups, one, state)
  step_s = Reshape (step_o, column_shape)
  drive_s = Reshape (drive_o, column_shape)
  B_s = Reshape (B_o, row_shape)
  C_s = Reshape (C_o, row_shape)
  last_axis = Constant <value_ints: ints = [-1]> ()
  A_shape = Concat <axis: int = 0> (groups, rest, state)
  A_s = Reshape (A, A_shape)
  state_shape = Concat <axis: int = 0> (batch, groups, rest, state)
  h_0 = Reshape (initial_state, state_shape)
  h_last, y_s = Scan <
    num_scan_inputs: int = 4,
    scan_input_axes: ints = [1, 1, 1, 1],
    scan_output_axes: ints = [1],{directions}
    body: graph = token (float[] h, float[] step_t, float[] drive_t, float[] B_t, float[] C_t) => (float[] h_t, float[] y_t) {{
      exponent = Mul (step_t, A_s)
      decay = Exp (exponent)
      kept = Mul (decay, h)
      written = Mul (drive_t, B_t)
      h_t = Add (kept, written)
      weighted = Mul (h_t, C_t)
      y_t = ReduceSum <keepdims: int = 1> (weighted, last_axis)
    }}
  > (h_0, step_s, drive_s, B_s, C_s)
  last_shape = Shape (initial_state)
  last_state = Reshape (h_last, last_shape)
  u_shape = Shape (u)
  y_o = Reshape (y_s, u_shape)
  y_scan = {order.format("y_o")}
  skip = Mul (u32, D)
  y_skip = Add (y_scan, skip)
{gate if op_type.startswith("Gated") else "  y = CastLike (y_skip, u)"}
"""


BODIES = {op_type: _body(op_type) for op_type in ("SelectiveScan", "GatedSelectiveScan")}


def specialised(op_type: str, attributes: Mapping[str, Any], shapes: Mapping[str, Any]) -> str:
    """The body of one node, for graphs without functions: without what the attributes leave out."""
    return _body(op_type, softplus=attributes["delta_softplus"], reverse=attributes["reverse"])
