"""Sequences that exist only to be taken apart again: SplitToSequence + SequenceAt becomes Split."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ._rewrite import Scope, attribute_int, constant, dims, input_at, ints, is_op, new_constant, new_node, replace, scopes


class SplitSequences(ir.passes.InPlacePass):
    """Replaces a SplitToSequence whose every use is a SequenceAt with a constant index by one Split.

    Given::

        f (float[2, 10] x) => (float[2, 4] a, float[2, 2] c) {
            size, first, last = Constant <...> ()
            s = SplitToSequence <axis: int = 1> (x, size)      # size = 4
            a = SequenceAt (s, first)                          # first = 0
            c = SequenceAt (s, last)                           # last = 2
        }

    Result::

        f (float[2, 10] x) => (float[2, 4] a, float[2, 2] c) <int64[3] sizes = {4, 4, 2}> {
            a, b, c = Split <axis: int = 1> (x, sizes)
        }

    torch.onnx.export writes `chunk`, `split` and `tensor_split` so. Equal parts use `num_outputs`; a smaller last one gets its sizes
    written out. Parts that nothing uses stay as outputs. `keepdims=0` gives a Squeeze per used part. Needs opset 18, for `num_outputs`,
    and the size of the axis, or the sizes of all parts, as constants; else nothing changes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for scope in scopes(model):
            if scope.opset < 18:
                continue
            for node in scope.graph:
                if is_op(node, "SplitToSequence"):
                    modified |= _split(scope, node)
        return ir.passes.PassResult(model, modified)


def _split(scope: Scope, node: ir.Node) -> bool:
    sequence, source = node.outputs[0], node.inputs[0]
    if sequence.is_graph_output() or source is None:
        return False
    shape, axis = dims(source), attribute_int(node, "axis", 0)
    users = list(sequence.consumers())
    if axis is None or not users or not all(is_op(user, "SequenceAt") and user.inputs[0] is sequence for user in users):
        return False
    positions = [ints(user.inputs[1]) for user in users]
    if shape is None or any(position is None or len(position) != 1 for position in positions):
        return False
    axis = axis + len(shape) if axis < 0 else axis
    total = shape[axis]
    split = input_at(node, 1)
    sizes = _sizes(total if isinstance(total, int) else None, split)
    if not sizes:
        return False
    indices = [position[0] + (len(sizes) if position[0] < 0 else 0) for position in positions if position]
    if not all(0 <= index < len(sizes) for index in indices):
        return False
    squeeze = split is None and attribute_int(node, "keepdims", 1) == 0

    if len(set(sizes)) == 1 and isinstance(total, int):
        new = new_node(node, "Split", [source], {"axis": axis, "num_outputs": len(sizes)}, outputs=len(sizes))
    else:
        parts = new_constant(scope, node, np.array(sizes, dtype=np.int64))
        new = new_node(node, "Split", [source, parts], {"axis": axis}, outputs=len(sizes))
    scope.graph.insert_before(node, new)
    for part, length in zip(new.outputs, sizes, strict=True):
        part.dtype = source.dtype  # type: ignore[assignment]  # may be unknown, as its source's
        part.shape = ir.Shape([*shape[:axis], length, *shape[axis + 1 :]])
    for user, index in zip(users, indices, strict=True):
        part = new.outputs[index]
        user_graph = user.graph
        assert user_graph is not None
        if squeeze or user_graph is not scope.graph or (user.outputs[0].is_graph_output() and part.is_graph_output()):
            axes = [new_constant(scope, user, np.array([axis], dtype=np.int64))] if squeeze else []
            alias = new_node(user, "Squeeze" if squeeze else "Identity", [part, *axes])
            user_graph.insert_before(user, alias)
            replace(user.outputs[0], alias.outputs[0])
        else:
            replace(user.outputs[0], part)
        user_graph.remove(user, safe=True)
    scope.graph.remove(node, safe=True)
    return True


def _sizes(total: int | None, split: ir.Value | None) -> list[int] | None:
    if split is None:
        return [1] * total if total is not None else None
    array = constant(split)
    if array is None:
        return None
    if array.ndim == 1:
        return [int(size) for size in array]
    part = int(array.reshape(()))
    if total is None or part <= 0:
        return None
    return [min(part, total - start) for start in range(0, total, part)]
