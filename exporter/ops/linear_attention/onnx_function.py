"""Causal linear attention in standard ONNX operators: a Scan over the tokens, with the query heads of a state as the rows of a product.

`CONTRIB` is ONNX Runtime's own operator, which computes the same in C++; its CPU kernel takes float32 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import RULES, LinearAttention

_BEFORE = """
  one = Constant <value_ints: ints = [1]> ()
  rest = Constant <value_ints: ints = [-1]> ()
  q_heads_scalar = Constant <value_int: int = @q_num_heads> ()
  heads_scalar = Constant <value_int: int = @kv_num_heads> ()
  q_heads = Reshape (q_heads_scalar, one)
  heads = Reshape (heads_scalar, one)
  repeats = Div (q_heads, heads)
  tokens = Shape <start: int = 0, end: int = 2> (q)
  q_shape = Concat <axis: int = 0> (tokens, heads, repeats, rest)
  column_shape = Concat <axis: int = 0> (tokens, heads, rest, one)
  row_shape = Concat <axis: int = 0> (tokens, heads, one, rest)
  scale_value = Constant <value_float: float = @scale> ()
  q32 = Cast <to: int = 1> (q)
  k32 = Cast <to: int = 1> (k)
  v32 = Cast <to: int = 1> (v)
  q_scaled = Mul (q32, scale_value)
  q_s = Reshape (q_scaled, q_shape)
  k_s = Reshape (k32, column_shape)
  v_s = Reshape (v32, row_shape)
"""

_DECAY = """
  decay32 = Cast <to: int = 1> (decay)
  factors = Exp (decay32)
  factor_s = Reshape (factors, column_shape)
"""

_BETA = """
  beta32 = Cast <to: int = 1> (beta)
  beta_shape = Concat <axis: int = 0> (tokens, rest, one, one)
  beta_s = Reshape (beta32, beta_shape)
"""

_AFTER = """
  y_shape = Concat <axis: int = 0> (tokens, rest)
  y_flat = Reshape (y_s, y_shape)
  y = CastLike (y_flat, q)
"""


def _body(rule: str) -> str:
    scanned, steps, seen, written = ["q", "k", "v"], [], "S", "v_t"
    if "gated" in rule:
        scanned.append("factor")
        steps.append("decayed = Mul (factor_t, S)")
        seen = "decayed"
    if "delta" in rule:
        scanned.append("beta")
        # The key as a row reads what the state holds for it.
        steps += [
            "k_row = Transpose <perm: ints = [0, 1, 3, 2]> (k_t)",
            f"held = MatMul (k_row, {seen})",
            "missing = Sub (v_t, held)",
            "update = Mul (beta_t, missing)",
        ]
        written = "update"
    steps += [f"write = Mul (k_t, {written})", f"S_t = Add ({seen}, write)", "y_t = MatMul (q_t, S_t)"]
    n = len(scanned)
    lines = "\n      ".join(steps)
    return (
        _BEFORE
        + (_DECAY if "gated" in rule else "")
        + (_BETA if "delta" in rule else "")
        + f"""
  last_state, y_s = Scan <
    num_scan_inputs: int = {n},
    scan_input_axes: ints = [{", ".join(["1"] * n)}],
    scan_output_axes: ints = [1],
    body: graph = token (float[] S, {", ".join(f"float[] {x}_t" for x in scanned)}) => (float[] S_t, float[] y_t) {{
      {lines}
    }}
  > (initial_state, {", ".join(f"{x}_s" for x in scanned)})
"""
        + _AFTER
    )


def optional_inputs(rule: str, suffix: str = "") -> str:
    """What follows the initial state in the standard operator's inputs, which leaves decay open where there is only beta."""
    decay = f", decay{suffix}" if "gated" in rule else ', ""' if "delta" in rule else ""
    return decay + (f", beta{suffix}" if "delta" in rule else "")


def _contrib(rule: str) -> str:
    given = ["q", "k", "v", *(["decay"] if "gated" in rule else []), *(["beta"] if "delta" in rule else [])]
    casts = "\n".join(f"  {name}32 = Cast <to: int = 1> ({name})" for name in given)
    return f"""
{casts}
  y32, last_state = com.microsoft.LinearAttention <
    q_num_heads: int = @q_num_heads,
    kv_num_heads: int = @kv_num_heads,
    update_rule: string = "{rule}",
    scale: float = @scale
  > (q32, k32, v32, initial_state{optional_inputs(rule, "32")})
  y = CastLike (y32, q)
"""


BODIES = {form.op_type: _body(rule) for form, rule in zip(LinearAttention.forms, RULES, strict=True)}
CONTRIB = {form.op_type: _contrib(rule) for form, rule in zip(LinearAttention.forms, RULES, strict=True)}


def settle(attributes: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The scale as a number: a body cannot take a 0 for "by the key's size"."""
    return {**attributes, "scale": attributes["scale"] or sizes["key"] ** -0.5}
