"""Reshape, Transpose, Reshape that only swap the last two axes: one Transpose."""

from __future__ import annotations

import onnx_ir as ir

from ._rewrite import attribute_ints, dims, is_op, new_node, producer, replace_node, scopes


class MergeReshapedTransposes(ir.passes.InPlacePass):
    """Replaces a matrix transposition done on flattened leading axes by one done in place.

    Given::

        f (float[b, 4, 5, 6] x) => (float[b, 4, 6, 5] y) {
            flat = Reshape (x, [-1, 5, 6])
            turned = Transpose <perm: ints = [0, 2, 1]> (flat)
            y = Reshape (turned, [-1, 4, 6, 5])
        }

    Result::

        f (float[b, 4, 5, 6] x) => (float[b, 4, 6, 5] y) {
            y = Transpose <perm: ints = [0, 1, 3, 2]> (x)
        }

    torch.onnx.export writes k^T of scaled_dot_product_attention so below opset 23.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for scope in scopes(model):
            for node in scope.graph:
                turn = producer(node.inputs[0], "Transpose") if is_op(node, "Reshape") else None
                flatten = producer(turn.inputs[0], "Reshape") if turn is not None else None
                if turn is None or flatten is None or attribute_ints(turn, "perm") != [0, 2, 1]:
                    continue
                x, flat, y = (dims(v) for v in (flatten.inputs[0], flatten.outputs[0], node.outputs[0]))
                if x is None or flat is None or y is None or len(x) != len(y) or len(x) < 3 or None in x or None in y:
                    continue
                # The last two axes are the matrix in all three shapes, and so the leading ones were only flattened.
                if x[-2:] != flat[-2:] or y != [*x[:-2], x[-1], x[-2]]:
                    continue
                rank = len(x)
                perm = [*range(rank - 2), rank - 1, rank - 2]
                replace_node(node, new_node(node, "Transpose", [flatten.inputs[0]], {"perm": perm}))
                modified = True
        return ir.passes.PassResult(model, modified)
