"""Nodes that give their input back, or that two of undo each other."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ._rewrite import (
    Scope,
    attribute_int,
    attribute_ints,
    constant,
    input_at,
    ints,
    is_op,
    new_node,
    producer,
    replace,
    replace_node,
    replaceable,
    same_shape,
    scopes,
)


class RemoveNoOps(ir.passes.InPlacePass):
    """Removes the nodes that hand on their input unchanged, in the main graph, in sub-graphs and in functions.

    Given::

        f (float[2, 3] x) => (float[2, 3] z) {
            a = Identity (x)
            b = Cast <to: int = 1> (a)
            c = Transpose <perm: ints = [1, 0]> (b)
            d = Transpose <perm: ints = [1, 0]> (c)
            y = Relu (d)
            z = Dropout (y)
        }

    Result::

        f (float[2, 3] x) => (float[2, 3] z) {
            z = Relu (x)
        }

    - Identity; Cast and CastLike to the type that the input has; Dropout outside training
    - Reshape, Expand and Slice (of step 1) to the shape that the input has, symbolic sizes compared by name
    - Transpose that moves no axis; Concat of one input; Unsqueeze then Squeeze, and Squeeze then Unsqueeze, of the same axes
    - two Transposes become one or none; of two Reshapes the second remains; CastLike with a known type becomes Cast

    When the output is an output of the graph, the input takes its name; where the input cannot (it is a graph's input, an initializer or
    another output) the node stays. Of arithmetic only `x * 1` and `x / 1` go, which give back every float bit for bit, NaN and -0.0 among
    them (`softplus` is exported with both); `x + 0` does not, as -0.0 + 0.0 is 0.0, and `x + 1e-15` is what these passes exist to keep.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for scope in scopes(model):
            for node in scope.graph:
                if node.domain != "" or not node.inputs or node.inputs[0] is None:
                    continue
                source = _source(node)
                if source is not None and _remove(scope, node, source):
                    modified = True
                else:
                    modified |= _simplify(scope, node)
        return ir.passes.PassResult(model, modified)


def _remove(scope: Scope, node: ir.Node, source: ir.Value) -> bool:
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]) or not replace(node.outputs[0], source):
        return False
    scope.graph.remove(node, safe=True)
    return True


def _source(node: ir.Node) -> ir.Value | None:
    """The value that the node's first output equals, or None."""
    x, out = node.inputs[0], node.outputs[0]
    op = node.op_type
    same = x
    if op == "Identity":
        return same
    if op == "Concat":
        return same if len(node.inputs) == 1 else None
    if op == "Dropout":
        training = input_at(node, 2)
        flag = constant(training)
        return same if training is None or (flag is not None and not flag.any()) else None
    if x is None:
        return None
    if op == "Cast":
        return same if x.dtype is not None and attribute_int(node, "to", 0) == x.dtype else None
    if op == "CastLike":
        like = input_at(node, 1)
        return same if x.dtype is not None and like is not None and like.dtype == x.dtype else None
    if op in ("Reshape", "Expand"):
        return same if same_shape(x, out) else None
    if op == "Slice":
        steps = input_at(node, 4)
        return same if same_shape(x, out) and (steps is None or set(ints(steps) or [0]) == {1}) else None
    if op == "Transpose":
        perm = attribute_ints(node, "perm")
        return same if perm is not None and perm == sorted(perm) else None
    if op in ("Squeeze", "Unsqueeze"):
        return _undone(node)
    if op in ("Mul", "Div"):
        return _times_one(node)
    return None


def _times_one(node: ir.Node) -> ir.Value | None:
    """The x of `x * 1`, `1 * x` or `x / 1` where the constant adds no axis."""
    pairs = [(0, 1), (1, 0)] if node.op_type == "Mul" else [(0, 1)]
    for i, j in pairs:
        x, one = node.inputs[i], constant(node.inputs[j])
        if x is not None and one is not None and one.size == 1 and one.dtype != np.bool_ and bool((one == 1).all()):
            rank = len(x.shape) if x.shape is not None else 0
            if one.ndim <= rank or one.ndim == 0:
                return x
    return None


def _undone(node: ir.Node) -> ir.Value | None:
    """For Squeeze(Unsqueeze(x)) and Unsqueeze(Squeeze(x)) of the same axes: x."""
    inverse = producer(node.inputs[0], "Unsqueeze" if node.op_type == "Squeeze" else "Squeeze")
    if inverse is None:
        return None
    inner, outer = inverse.inputs[0], node.inputs[0]
    longer = inner if node.op_type == "Unsqueeze" else outer
    rank = len(longer.shape) if longer is not None and longer.shape is not None else None
    axes = [ints(input_at(inverse, 1)), ints(input_at(node, 1))]
    if rank is None and any(axis < 0 for both in axes for axis in both or ()):
        return None
    positive = [None if both is None else sorted(axis % rank if rank else axis for axis in both) for both in axes]
    return inner if positive[0] is not None and positive[0] == positive[1] else None


def _simplify(scope: Scope, node: ir.Node) -> bool:
    if is_op(node, "CastLike"):
        like = input_at(node, 1)
        if like is None or like.dtype is None or any(name in node.attributes for name in ("saturate", "round_mode")):
            return False
        replace_node(node, new_node(node, "Cast", [node.inputs[0]], {"to": int(like.dtype)}))
        return True
    if is_op(node, "Transpose"):
        before = producer(node.inputs[0], "Transpose")
        perms = [attribute_ints(n, "perm") for n in (before, node) if n is not None]
        if before is None or perms[0] is None or perms[1] is None:
            return False
        perm = [perms[0][axis] for axis in perms[1]]
        source = before.inputs[0]
        if source is not None and perm == sorted(perm) and replaceable(node.outputs[0], source):
            return _remove(scope, node, source)
        replace_node(node, new_node(node, "Transpose", [source], {"perm": perm}))
        return True
    if is_op(node, "Reshape"):
        before = producer(node.inputs[0], "Reshape")
        target = ints(input_at(node, 1))
        if before is None or target is None or 0 in target:
            return False
        node.replace_input_with(0, before.inputs[0])
        return True
    return False
