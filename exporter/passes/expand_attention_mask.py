"""Attention masks that leave the length of the queries to broadcasting, written out.

The operator's definition broadcasts the mask to [batch, heads, query length, key length]. ONNX Runtime 1.32 refuses a mask whose last but
one size is 1 and not the query length ("inconsistent q_sequence_length (between attn_mask and Q)"), which is how torch.onnx.export writes
the padding mask [batch, 1, 1, key length] of a cross-attention from opset 23 on. To be dropped when ONNX Runtime broadcasts.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ._rewrite import Scope, dims, input_at, is_op, new_constant, new_node, scopes


class ExpandAttentionMask(ir.passes.InPlacePass):
    """Expands the last but one axis of an Attention's mask from 1 to the length of the queries.

    Given::

        f (float[b, 2, 5, 4] q, float[b, 2, 7, 4] k, float[b, 2, 7, 4] v, float[b, 1, 1, 7] mask) => (float[b, 2, 5, 4] y) {
            y = Attention (q, k, v, mask)
        }

    Result::

        f (float[b, 2, 5, 4] q, float[b, 2, 7, 4] k, float[b, 2, 7, 4] v, float[b, 1, 1, 7] mask) => (float[b, 2, 5, 4] y)
          <int64[2] length = {5, 1}> {
            expanded = Expand (mask, length)
            y = Attention (q, k, v, expanded)
        }

    When the length is symbolic it is read from the queries with Shape. Masks that several nodes share are expanded once.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for scope in scopes(model):
            made: dict[tuple[ir.Value, int | str], ir.Value] = {}
            for node in scope.graph:
                q, mask = (input_at(node, 0), input_at(node, 3)) if is_op(node, "Attention") else (None, None)
                q_shape, shape = dims(q), dims(mask)
                if q is None or mask is None or q_shape is None or shape is None or len(shape) < 2 or shape[-2] != 1:
                    continue
                axis = 2 if len(q_shape) == 4 else 1  # [batch, heads, length, size] or [batch, length, heads * size]
                length = q_shape[axis]
                if length in (1, None):
                    continue
                assert length is not None
                if (mask, length) not in made:
                    made[mask, length] = _expand(scope, node, mask, q, axis, length)
                node.replace_input_with(3, made[mask, length])
                modified = True
        return ir.passes.PassResult(model, modified)


def _expand(scope: Scope, node: ir.Node, mask: ir.Value, q: ir.Value, axis: int, length: int | str) -> ir.Value:
    before: list[ir.Node] = []
    if isinstance(length, int):
        target = new_constant(scope, node, np.array([length, 1], dtype=np.int64))
    else:
        size = new_node(node, "Shape", [q], {"start": axis, "end": axis + 1})
        one = new_constant(scope, node, np.array([1], dtype=np.int64))
        both = new_node(node, "Concat", [size.outputs[0], one], {"axis": 0})
        before, target = [size, both], both.outputs[0]
    expand = new_node(node, "Expand", [mask, target])
    out = expand.outputs[0]
    out.type = mask.type
    shape = list(mask.shape or ())
    shape[-2] = length if isinstance(length, int) else ir.SymbolicDim(length)
    out.shape = ir.Shape(shape)
    scope.graph.insert_before(node, [*before, expand])
    return out
