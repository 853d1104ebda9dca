"""RWKV-7's time mixing in standard ONNX operators: a Scan over the tokens."""

from __future__ import annotations

_COLUMNS, _ROWS = ("decay", "k", "b"), ("r", "v", "a")

_INPUTS = "\n".join(
    f"  {x}_wide = Cast <to: int = 1> ({x})\n  {x}_s = Reshape ({x}_wide, {'column' if x in _COLUMNS else 'row'}_shape)"
    for x in (*_COLUMNS, *_ROWS)
)

BODIES = {
    "RWKV7": f"""
  one = Constant <value_ints: ints = [1]> ()
  rest = Constant <value_ints: ints = [-1]> ()
  heads_scalar = Constant <value_int: int = @num_heads> ()
  heads = Reshape (heads_scalar, one)
  tokens = Shape <start: int = 0, end: int = 2> (r)
  column_shape = Concat <axis: int = 0> (tokens, heads, rest, one)
  row_shape = Concat <axis: int = 0> (tokens, heads, one, rest)
{_INPUTS}
  factor_s = Exp (decay_s)
  last_state, y_s = Scan <
    num_scan_inputs: int = 6,
    scan_input_axes: ints = [1, 1, 1, 1, 1, 1],
    scan_output_axes: ints = [1],
    body: graph = token (
      float[] S, float[] r_t, float[] factor_t, float[] k_t, float[] v_t, float[] a_t, float[] b_t
    ) => (float[] S_t, float[] y_t) {{
      decayed = Mul (factor_t, S)
      removed = MatMul (a_t, S)
      back = Mul (b_t, removed)
      write = Mul (k_t, v_t)
      change = Add (back, write)
      S_t = Add (decayed, change)
      y_t = MatMul (r_t, S_t)
    }}
  > (initial_state, r_s, factor_s, k_s, v_s, a_s, b_s)
  y_shape = Concat <axis: int = 0> (tokens, rest)
  y_flat = Reshape (y_s, y_shape)
  y = CastLike (y_flat, r)
"""
}
