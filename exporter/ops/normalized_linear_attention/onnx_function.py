"""Normalised linear attention in standard ONNX operators: keys and values are summed into one matrix a head first."""

from __future__ import annotations

BODIES = {
    "NormalizedLinearAttention": """
  one = Constant <value_ints: ints = [1]> ()
  rest = Constant <value_ints: ints = [-1]> ()
  heads_scalar = Constant <value_int: int = @num_heads> ()
  heads = Reshape (heads_scalar, one)
  q_tokens = Shape <start: int = 0, end: int = 2> (q)
  k_tokens = Shape <start: int = 0, end: int = 2> (k)
  q_shape = Concat <axis: int = 0> (q_tokens, heads, rest)
  k_shape = Concat <axis: int = 0> (k_tokens, heads, rest)
  q32 = Cast <to: int = 1> (q)
  k32 = Cast <to: int = 1> (k)
  v32 = Cast <to: int = 1> (v)
  q_features = Relu (q32)
  k_features = Relu (k32)
  q_heads = Reshape (q_features, q_shape)
  k_heads = Reshape (k_features, k_shape)
  v_heads = Reshape (v32, k_shape)
  phi_q = Transpose <perm: ints = [0, 2, 1, 3]> (q_heads)
  phi_k = Transpose <perm: ints = [0, 2, 3, 1]> (k_heads)
  values = Transpose <perm: ints = [0, 2, 1, 3]> (v_heads)
  context = MatMul (phi_k, values)
  total = ReduceSum <keepdims: int = 1> (phi_k, rest)
  numerator = MatMul (phi_q, context)
  sum = MatMul (phi_q, total)
  epsilon = Constant <value_float: float = @eps> ()
  denominator = Add (sum, epsilon)
  ratio = Div (numerator, denominator)
  y_tokens = Transpose <perm: ints = [0, 2, 1, 3]> (ratio)
  y_shape = Concat <axis: int = 0> (q_tokens, rest)
  y_flat = Reshape (y_tokens, y_shape)
  y = CastLike (y_flat, q)
"""
}
