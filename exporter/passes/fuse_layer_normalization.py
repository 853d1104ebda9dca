"""Hand-written layer normalisation, as LayerNormalization (opset 17)."""

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
from ._rewrite import Scope, new_node, producer, replace_node, scopes


class FuseLayerNormalization(ir.passes.InPlacePass):
    """Replaces `(x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps) * weight + bias` by LayerNormalization.

    Given::

        f (float[batch, 8] x) => (float[batch, 8] y) <float[8] weight, float[8] bias> {
            mean = ReduceMean <keepdims: int = 1> (x, last)
            centred = Sub (x, mean)
            square = Mul (centred, centred)
            variance = ReduceMean <keepdims: int = 1> (square, last)
            biased = Add (variance, eps)                          # eps = 1e-6
            root = Sqrt (biased)
            normalised = Div (centred, root)
            scaled = Mul (normalised, weight)
            y = Add (scaled, bias)
        }

    Result::

        f (float[batch, 8] x) => (float[batch, 8] y) <float[8] weight, float[8] bias> {
            y = LayerNormalization <axis: int = -1, epsilon: float = 1e-6, stash_type: int = 1> (x, weight, bias)
        }

    The variance is the biased one (divided by n). Weight and bias are taken in when their shape is that of the normalised axes, so an
    adaptive scale of shape [batch, 1, n] stays outside; without a weight the scale is a constant of ones. float32 only. The square and
    the division may be written in the ways that FuseRMSNormalization knows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for scope in scopes(model):
            if scope.opset >= 17:
                for node in scope.graph:
                    modified |= node.domain == "" and _fuse(scope, node)
        return ir.passes.PassResult(model, modified)


def _centred(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(x, first axis) of `x - mean(x)`."""
    node = producer(value, "Sub")
    averaged = mean(node.inputs[1]) if node is not None else None
    return averaged if node is not None and averaged is not None and averaged[0] is node.inputs[0] else None


def _fuse(scope: Scope, node: ir.Node) -> bool:
    found = normalised(node)
    biased = plus_constant(found[1]) if found is not None else None
    centred = _centred(found[0]) if found is not None else None
    if biased is None or centred is None:
        return False
    variance, epsilon = biased
    averaged = mean(variance)
    if averaged is None or averaged[1] != centred[1] or _centred(square(averaged[0])) != centred:
        return False
    x, axis = centred
    sizes = static_tail(x, axis)
    if sizes is None or not is_float32(x, node.outputs[0]):
        return False

    last = node
    scale = bias = None
    product = only_user(last.outputs[0], "Mul")
    if product is not None and has_dims(factor := other_operand(product, last.outputs[0]), sizes):
        last, scale = product, factor
    total = only_user(last.outputs[0], "Add")
    if total is not None and has_dims(term := other_operand(total, last.outputs[0]), sizes):
        last, bias = total, term
    if scale is None:
        scale = ones(scope, last, sizes, ir.DataType.FLOAT)
    inputs = [x, scale] if bias is None else [x, scale, bias]
    rank = len(x.shape or ())
    fused = new_node(last, "LayerNormalization", inputs, {"axis": axis - rank, "epsilon": epsilon, "stash_type": 1})
    replace_node(last, call_it(fused, "layer_norm"))
    return True
