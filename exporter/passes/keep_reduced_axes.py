"""A reduction that drops its axes, and the node that puts them back."""

from __future__ import annotations

import onnx_ir as ir

from ._match import only_user
from ._rewrite import attribute_int, dims, input_at, ints, new_node, replace_node, scopes

_REDUCTIONS = frozenset(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare".split()
)


class KeepReducedAxes(ir.passes.InPlacePass):
    """Replaces a reduction with keepdims = 0, and the Reshape or Unsqueeze that restores the axes as 1, by one with keepdims = 1.

    Given::

        f (float[b, 5, 8] x) => (float[b, 5, 1] y) {
            m = ReduceMean <keepdims: int = 0> (x, last)       # last = [2]
            y = Reshape (m, target)                            # target = [-1, 5, 1]
        }

    Result::

        f (float[b, 5, 8] x) => (float[b, 5, 1] y) {
            y = ReduceMean <keepdims: int = 1> (x, last)
        }

    torch.onnx.export writes `var(keepdim=True)` so.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for scope in scopes(model):
            for node in scope.graph:
                if node.domain != "" or node.op_type not in _REDUCTIONS or attribute_int(node, "keepdims", 1) != 0:
                    continue
                restore = only_user(node.outputs[0], "Reshape", "Unsqueeze")
                shape, axes = dims(node.inputs[0]), ints(input_at(node, 1))
                if restore is None or restore.inputs[0] is not node.outputs[0] or shape is None or None in shape or not axes:
                    continue
                reduced = {axis % len(shape) for axis in axes}
                if dims(restore.outputs[0]) != [1 if i in reduced else size for i, size in enumerate(shape)]:
                    continue
                attributes = {**node.attributes, "keepdims": 1}
                replace_node(restore, new_node(restore, node.op_type, node.inputs, attributes))
                scope.graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)
