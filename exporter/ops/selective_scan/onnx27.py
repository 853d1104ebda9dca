"""The selective scan as the standard's `LinearAttention` with the rule "gated": for interchange, not for speed.

Each channel is a head with keys of the size of the state and values of size 1::

    decay = delta A        k = B of the channel's group        v = delta u        q = C of the channel's group        scale = 1

Everything is float32, because delta A in 16 bits would lose what a long decay is, and B and C are repeated for every channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import Reason, UnsupportedError


def body(op_type: str, attributes: Mapping[str, Any], shapes: Mapping[str, Sequence[int | str | None] | None]) -> str:
    """The body of one node, of opset 27.

    Raises:
        UnsupportedError: The number of channels is not static: the operator has it as an attribute.
    """
    channels = (shapes["A"] or (None, None))[0]
    if not isinstance(channels, int):
        raise UnsupportedError(
            "selective_scan has no standard operator here",
            reasons=[Reason("the number of channels is dynamic, and is an attribute of LinearAttention", "A")],
            hint="choose --ssm-op plugin or decomposed",
        )
    turned = "Slice ({}, first, before, one, back)" if attributes["reverse"] else "Identity ({})"
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
  back = Constant <value_ints: ints = [-1]> ()
  first = Constant <value_ints: ints = [-1]> ()
  before = Constant <value_ints: ints = [-9223372036854775807]> ()
  tokens = Shape <start: int = 0, end: int = 2> (u)
  state = Shape <start: int = 1, end: int = 2> (A)
  columns = Shape <start: int = 2, end: int = 3> (B)
  groups = Div (columns, state)
  channels = Constant <value_ints: ints = [{channels}]> ()
  members = Div (channels, groups)

  u32 = Cast <to: int = 1> (u)
  delta32 = Cast <to: int = 1> (delta)
  biased = Add (delta32, delta_bias)
  step = {"Softplus" if attributes["delta_softplus"] else "Identity"} (biased)
  drive = Mul (step, u32)
  B32 = Cast <to: int = 1> (B)
  C32 = Cast <to: int = 1> (C)
  step_o = {turned.format("step")}
  drive_o = {turned.format("drive")}
  B_o = {turned.format("B32")}
  C_o = {turned.format("C32")}

  step_column = Unsqueeze (step_o, rest)
  exponents = Mul (step_column, A)
  flat_shape = Concat <axis: int = 0> (tokens, rest)
  decay = Reshape (exponents, flat_shape)
  group_shape = Concat <axis: int = 0> (tokens, groups, one, state)
  member_shape = Concat <axis: int = 0> (tokens, groups, members, state)
  B_group = Reshape (B_o, group_shape)
  C_group = Reshape (C_o, group_shape)
  B_member = Expand (B_group, member_shape)
  C_member = Expand (C_group, member_shape)
  k = Reshape (B_member, flat_shape)
  q = Reshape (C_member, flat_shape)
  h_0 = Unsqueeze (initial_state, rest)
  y_o, h_last = LinearAttention <
    q_num_heads: int = {channels},
    kv_num_heads: int = {channels},
    update_rule: string = "gated",
    scale: float = 1.0
  > (q, k, drive_o, h_0, decay)
  last_state = Squeeze (h_last, rest)
  y_scan = {turned.format("y_o")}
  skip = Mul (u32, D)
  y_skip = Add (y_scan, skip)
{gate if op_type.startswith("Gated") else "  y = CastLike (y_skip, u)"}
"""
