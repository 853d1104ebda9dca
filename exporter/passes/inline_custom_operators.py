"""Our own operators as plain standard ones, for readers that take neither functions nor nodes of our domain."""

from __future__ import annotations

import onnx_ir as ir

from ..ops.onnx_forms import add_functions, custom_nodes, forms, values_of
from ._splice import input_shapes, splice


class InlineCustomOperators(ir.passes.InPlacePass):
    """Replaces every node of our domain by its body, of standard operators of the model's opset.

    Given::

        f (float[1, 8, 4] x, float[4, 1, 3] w, float[4] b, float[1, 4, 2] s) => (float[1, 4, 8] y, float[1, 4, 2] l) {
            y, l = isthmus.CausalConv1d <silu = 1> (x, w, b, s)
        }

    Result::

        f (float[1, 8, 4] x, float[4, 1, 3] w, float[4] b, float[1, 4, 2] s) => (float[1, 4, 8] y, float[1, 4, 2] l) {
            padded = Concat <axis = 2> (s, x)
            l = Slice (padded, [-2], [INT64_MAX], [2])
            linear = Conv <group = 4> (padded, w, b)
            sigmoid = Sigmoid (linear)
            y = Mul (linear, sigmoid)
        }

    What is known of a node, its attributes and static sizes, makes its body simpler than the function, which has to serve all. The
    functions are removed.

    Args:
        op_types: The node types to replace; all when it is None.
    """

    def __init__(self, op_types: frozenset[str] | None = None) -> None:
        super().__init__()
        self._op_types = op_types

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        nodes = [n for n in custom_nodes(model) if self._op_types is None or n.op_type in self._op_types]
        for node in nodes:
            op, _ = forms()[node.op_type]
            part = op.part("onnx")
            specialise = getattr(part, "specialised", None)
            body = specialise(node.op_type, values_of(node), input_shapes(node)) if specialise else part.BODIES[node.op_type]
            splice(node, body, model.opset_imports[""])
        add_functions(model)
        return ir.passes.PassResult(model, bool(nodes))
