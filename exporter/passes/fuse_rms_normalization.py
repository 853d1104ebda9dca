"""Hand-written root-mean-square normalisation, as RMSNormalization (opset 23)."""

from __future__ import annotations

import onnx_ir as ir

from ._match import (
    call_it,
    has_dims,
    is_float32,
    mean,
    normalised,
    ones,
    only_user,
    other_operand,
    plus_constant,
    square,
    static_tail,
)
from ._rewrite import Scope, attribute_int, new_node, producer, replace_node, scopes


class FuseRMSNormalization(ir.passes.InPlacePass):
    """Replaces `x / sqrt(mean(x ** 2) + eps) * weight` by RMSNormalization.

    Given::

        f (float[batch, 5, 8] x) => (float[batch, 5, 8] y) <float[8] weight> {
            square = Pow (x, two)
            mean = ReduceMean <keepdims: int = 1> (square, last)
            biased = Add (mean, eps)                              # eps = 1e-15
            root = Sqrt (biased)
            inverse = Reciprocal (root)
            normalised = Mul (x, inverse)
            y = Mul (normalised, weight)
        }

    Result::

        f (float[batch, 5, 8] x) => (float[batch, 5, 8] y) <float[8] weight> {
            y = RMSNormalization <axis: int = -1, epsilon: float = 1e-15, stash_type: int = 1> (x, weight)
        }

    The square may be `x * x`, the division `x / sqrt(..)`, `x * (1 / sqrt(..))` or `x * (..) ** -0.5`; the mean is over the last axes. A
    weight is taken in when its shape is that of the normalised axes; without one the scale is a constant of ones. The arithmetic must be
    float32, as the operator's own (`stash_type` 1). When float16 or bfloat16 is cast to float32, normalised and cast back before the weight
    is applied, the operator does the casts: that is its definition. Nothing changes below opset 23.

    Runs after FuseLayerNormalization, whose pattern holds this one, with `x - mean(x)` for x.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for scope in scopes(model):
            if scope.opset >= 23:
                for node in scope.graph:
                    modified |= node.domain == "" and _fuse(scope, node)
        return ir.passes.PassResult(model, modified)


def _fuse(scope: Scope, node: ir.Node) -> bool:
    found = normalised(node)
    biased = plus_constant(found[1]) if found is not None else None
    if found is None or biased is None:
        return False
    x, (mean_square, epsilon) = found[0], biased
    averaged = mean(mean_square)
    if averaged is None or square(averaged[0]) is not x or not is_float32(x, node.outputs[0]):
        return False
    axis = averaged[1]
    sizes = static_tail(x, axis)
    if sizes is None:
        return False

    last, source = node, x
    narrow, narrowed = producer(x, "Cast"), only_user(node.outputs[0], "Cast")
    if narrow is not None and narrowed is not None:
        original = narrow.inputs[0]
        half = original is not None and original.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        if original is not None and half and attribute_int(narrowed, "to", 0) == original.dtype:
            last, source = narrowed, original
    scale: ir.Value | None = None
    product = only_user(last.outputs[0], "Mul")
    if product is not None:
        factor = other_operand(product, last.outputs[0])
        if factor is not None and factor.dtype == source.dtype and has_dims(factor, sizes):
            last, scale = product, factor
    if scale is None:
        scale = ones(scope, last, sizes, source.dtype or ir.DataType.FLOAT)
    rank = len(x.shape or ())
    fused = new_node(last, "RMSNormalization", [source, scale], {"axis": axis - rank, "epsilon": epsilon, "stash_type": 1})
    replace_node(last, call_it(fused, "rms_norm"))
    return True
