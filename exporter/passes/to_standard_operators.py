"""Our own operators as the standard ones of opset 27."""

from __future__ import annotations

import onnx_ir as ir

from ..ops.onnx_forms import add_functions, custom_nodes, forms, values_of
from ._splice import input_shapes, splice

OPSET = 27
"""The first opset with LinearAttention and CausalConvWithState."""


def standard_body(node: ir.Node) -> str:
    """The text of the nodes that a node of our domain, whose operator has the part `onnx27`, becomes.

    Raises:
        UnsupportedError: What has to be an attribute there is dynamic here.
    """
    body: str = forms()[node.op_type][0].part("onnx27").body(node.op_type, values_of(node), input_shapes(node))
    return body


class ToStandardOperators(ir.passes.InPlacePass):
    """Replaces nodes of our domain by the standard operators of opset 27, `LinearAttention` and `CausalConvWithState`.

    Given::

        f (float[B, L, 8] q, float[B, L, 8] k, float[B, L, 8] v, float[B, 2, 4, 4] s) => (float[B, L, 8] y, float[B, 2, 4, 4] l) {
            y, l = isthmus.PlainLinearAttention <q_num_heads = 2, kv_num_heads = 2, scale = 0.5> (q, k, v, s)
        }

    Result::

        f (float[B, L, 8] q, float[B, L, 8] k, float[B, L, 8] v, float[B, 2, 4, 4] s) => (float[B, L, 8] y, float[B, 2, 4, 4] l) {
            y, l = LinearAttention <q_num_heads = 2, kv_num_heads = 2, scale = 0.5, update_rule = "linear"> (q, k, v, s)
        }

    Operators that no standard one expresses stay as they are: `CustomOp.lacks` says why. The model has to be of opset 27 (`ConvertOpset`).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        nodes = [n for n in custom_nodes(model) if forms()[n.op_type][0].has("onnx27")]
        for node in nodes:
            splice(node, standard_body(node), model.opset_imports[""])
        add_functions(model)
        return ir.passes.PassResult(model, bool(nodes))
