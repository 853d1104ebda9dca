"""One element of an axis, taken by a Slice and a Squeeze: a Gather with a scalar index."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ._rewrite import dims, input_at, ints, is_op, new_constant, new_node, producer, replace_node, scopes

_END = 2**31 - 1  # torch.onnx.export writes 2**63 - 1 for "to the end"; anything this large is meant so


class GatherSlices(ir.passes.InPlacePass):
    """Replaces Slice [i : i + 1] and the Squeeze of the same axis by one Gather.

    Given::

        f (float[3, 2, 5] x) => (float[2, 5] y) {
            start, end, axes = Constant <...> ()     # [1], [2], [0]
            s = Slice (x, start, end, axes)
            y = Squeeze (s, axes)
        }

    Result::

        f (float[3, 2, 5] x) => (float[2, 5] y) <int64 index = {1}> {
            y = Gather <axis: int = 0> (x, index)
        }

    `unbind` into n parts is exported as n such pairs; n Gathers are fewer nodes than Split and n Squeezes. Applies when the Squeeze has
    no other axis, the step is 1, and the index is known to lie inside the axis (Slice clamps, Gather does not).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for scope in scopes(model):
            for node in scope.graph:
                cut = producer(node.inputs[0], "Slice") if is_op(node, "Squeeze") else None
                if cut is None or cut.outputs[0].is_graph_output():
                    continue
                found = _index(node, cut)
                if found is None:
                    continue
                index, axis = found
                position = new_constant(scope, node, np.array(index, dtype=np.int64))
                replace_node(node, new_node(node, "Gather", [cut.inputs[0], position], {"axis": axis}))
                if cut.graph is not None and not cut.outputs[0].uses():
                    cut.graph.remove(cut, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)


def _index(squeeze: ir.Node, cut: ir.Node) -> tuple[int, int] | None:
    """Which element of which axis the pair takes."""
    shape = dims(cut.inputs[0])
    starts, ends, axes = (ints(input_at(cut, i)) for i in (1, 2, 3))
    steps, squeezed = ints(input_at(cut, 4)), ints(input_at(squeeze, 1))
    if starts is None or ends is None or shape is None or squeezed is None or len(starts) != 1 or len(squeezed) != 1:
        return None
    if input_at(cut, 3) is None:
        axes = [0]
    if axes is None or len(axes) != 1 or (input_at(cut, 4) is not None and steps != [1]):
        return None
    axis = axes[0] % len(shape)
    if squeezed[0] % len(shape) != axis:
        return None
    (start,), (end,), total = starts, ends, shape[axis]
    if isinstance(total, int):
        first, last = (max(0, min(total, i + total if i < 0 else i)) for i in (start, end))
        return (first, axis) if last - first == 1 else None
    # The last element of an axis of any size but 0; a Slice of an empty axis would make the Squeeze fail as well.
    return (-1, axis) if start == -1 and end >= _END else None
