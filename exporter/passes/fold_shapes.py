"""Shape arithmetic: what is known of sizes, in whole or in part, taken out of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ._rewrite import (
    Array,
    Scope,
    attribute_int,
    constant,
    constant_tensor,
    dims,
    input_at,
    ints,
    is_op,
    merge_shape,
    new_constant,
    replace,
    scopes,
)

_LIMIT = 64  # elements of a value that is followed: a shape, or a few sizes
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


class FoldShapes(ir.passes.InPlacePass):
    """Computes shapes with the sizes that are known, and gives Reshape a constant target where at most one size is not.

    Given::

        f (float[batch, 16, 64] x) => (float[batch, 16, 4, 16] z) {
            batch = Shape <start: int = 0, end: int = 1> (x)
            tail = Constant <value_ints: ints = [16, 4, 16]> ()
            target = Concat <axis: int = 0> (batch, tail)
            z = Reshape <allowzero: int = 1> (x, target)
        }

    Result::

        f (float[batch, 16, 64] x) => (float[batch, 16, 4, 16] z) <int64[4] target = {-1, 16, 4, 16}> {
            z = Reshape (x, target)
        }

    Values are followed element by element through Shape, Size, Gather, Slice, Concat, Squeeze, Unsqueeze, Reshape, Cast and integer
    arithmetic: an element is a size, or the name of a symbolic one, or unknown. A value whose elements are all sizes becomes a constant.
    For the target of a Reshape what the values leave open is read from the shape of its output. With two or more open sizes, those equal
    to the input's at the same place become 0, which copies (`allowzero` = 0), and the last one -1. A Reshape with a size of zero is left
    alone, and `allowzero` is dropped where no zero is, since some run times refuse it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        known: dict[ir.Value, Array] = {}
        for scope in scopes(model):
            for node in scope.graph:
                if node.domain != "" or is_op(node, "Constant"):
                    continue
                elements = _follow(node, known)
                if elements is not None:
                    known[node.outputs[0]] = elements
                    modified |= _fold(scope, node, elements)
                elif is_op(node, "Reshape", "Expand"):
                    modified |= _annotate(node, known)
                    modified |= is_op(node, "Reshape") and _fix_reshape(scope, node, known)
        return ir.passes.PassResult(model, modified)


def _fold(scope: Scope, node: ir.Node, elements: Array) -> bool:
    out = node.outputs[0]
    dtype = _dtype(node)
    if dtype is None or out.is_graph_output() or not out.uses() or not all(type(e) is int for e in elements.reshape(-1)):
        return False
    if all(constant_tensor(value) is not None for value in node.inputs if value is not None):
        return False  # constant folding does this one
    return replace(out, new_constant(scope, node, elements.astype(dtype.numpy())))


def _dtype(node: ir.Node) -> ir.DataType | None:
    if is_op(node, "Shape", "Size"):
        return ir.DataType.INT64
    if is_op(node, "Cast"):
        to = attribute_int(node, "to", 0)
        return ir.DataType(to) if to else None
    return node.outputs[0].dtype or (node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None)


def _elements(value: ir.Value | None, known: dict[ir.Value, Array]) -> Array | None:
    """What is known of an integer value, as an array of objects: int, str (a symbol) or None."""
    if value is None:
        return None
    if value in known:
        return known[value]
    array = constant(value, _LIMIT * 8)
    if array is None or array.dtype not in (np.int64, np.int32):
        return None
    elements = np.empty(array.shape, dtype=object)
    elements[...] = array.astype(object)
    return elements


def _objects(items: list[Any]) -> Array:
    elements = np.empty(len(items), dtype=object)
    elements[:] = items
    return elements


def _follow(node: ir.Node, known: dict[ir.Value, Array]) -> Array | None:
    """The elements of the node's output, or None when it is not a value to follow."""
    if is_op(node, "Shape"):
        shape = dims(node.inputs[0])
        start, end = attribute_int(node, "start", 0), attribute_int(node, "end", len(shape or ()))
        return None if shape is None or start is None or end is None else _objects(shape[start:end])
    if is_op(node, "Size"):
        shape = dims(node.inputs[0])
        if shape is None or not all(isinstance(d, int) for d in shape):
            return None
        return _object_scalar(int(np.prod([d for d in shape if isinstance(d, int)], dtype=np.int64)))
    handler = _HANDLERS.get(node.op_type)
    if handler is None:
        return None
    if is_op(node, "Cast") and _dtype(node) not in _INTEGERS:
        return None
    inputs = [_elements(value, known) for value in node.inputs]
    if not inputs or inputs[0] is None or any(e is None for e, v in zip(inputs, node.inputs, strict=True) if v is not None):
        return None
    try:
        result = handler(node, [e for e in inputs if e is not None])
    except (ValueError, IndexError, TypeError, ZeroDivisionError):
        return None
    return result if result is not None and result.size <= _LIMIT else None


def _object_scalar(item: object) -> Array:
    elements = np.empty((), dtype=object)
    elements[()] = item
    return elements


def _gather(node: ir.Node, inputs: list[Array]) -> Array:
    axis = attribute_int(node, "axis", 0)
    return np.asarray(np.take(inputs[0], inputs[1].astype(np.int64), axis=axis), dtype=object)


def _slice(node: ir.Node, inputs: list[Array]) -> Array | None:
    data = inputs[0]
    if data.ndim != 1 or len(inputs) != sum(value is not None for value in node.inputs) or any(i.size != 1 for i in inputs[1:]):
        return None
    bounds = [int(i.reshape(())) for i in inputs[1:]]  # raises for a symbol
    step = bounds[3] if len(bounds) > 3 else 1
    return data[bounds[0] : bounds[1]] if step == 1 and len(bounds) >= 2 else None


def _concat(node: ir.Node, inputs: list[Array]) -> Array:
    axis = attribute_int(node, "axis", 0)
    return np.concatenate(inputs, axis=0 if axis is None else axis)


def _squeeze(node: ir.Node, inputs: list[Array]) -> Array:
    del node
    axes = tuple(int(a) for a in inputs[1].reshape(-1)) if len(inputs) > 1 else None
    return np.squeeze(inputs[0], axis=axes)


def _unsqueeze(node: ir.Node, inputs: list[Array]) -> Array:
    del node
    return np.expand_dims(inputs[0], tuple(int(a) for a in inputs[1].reshape(-1)))


def _reshape(node: ir.Node, inputs: list[Array]) -> Array | None:
    del node
    target = [int(i) for i in inputs[1].reshape(-1)]
    return inputs[0].reshape(target) if 0 not in target else None


def _same(node: ir.Node, inputs: list[Array]) -> Array:
    del node
    return inputs[0]


def _arithmetic(function: Callable[[int, int], int]) -> Callable[[ir.Node, list[Array]], Array]:
    def apply(node: ir.Node, inputs: list[Array]) -> Array:
        del node
        a, b = np.broadcast_arrays(*inputs)
        result = np.empty(a.shape, dtype=object)
        for index in np.ndindex(a.shape):
            left, right = a[index], b[index]
            result[index] = function(left, right) if isinstance(left, int) and isinstance(right, int) else None
        return result

    return apply


_HANDLERS: dict[str, Callable[[ir.Node, list[Array]], Array | None]] = {
    "Add": _arithmetic(lambda a, b: a + b),
    "Cast": _same,
    "Concat": _concat,
    "Div": _arithmetic(lambda a, b: int(abs(a) // abs(b)) * (1 if (a >= 0) == (b > 0) else -1)),  # ONNX rounds towards zero
    "Gather": _gather,
    "Identity": _same,
    "Max": _arithmetic(max),
    "Min": _arithmetic(min),
    "Mul": _arithmetic(lambda a, b: a * b),
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _arithmetic(lambda a, b: a - b),
    "Unsqueeze": _unsqueeze,
}


def _annotate(node: ir.Node, known: dict[ir.Value, Array]) -> bool:
    """Gives the output the sizes that the target names, so that a later no-op can be told from its shape."""
    elements = _elements(input_at(node, 1), known)
    if elements is None or elements.ndim != 1 or any(isinstance(e, int) and (e < -1 or e == 0) for e in elements):
        return False
    target: list[int | str | None] = [None if e == -1 else e for e in elements]
    if is_op(node, "Expand"):
        source = dims(node.inputs[0])
        if source is None or len(source) != len(target):
            return False
        # A size of 1 takes the other's; equal names are equal sizes; of two different names either may be 1.
        if -1 in elements:
            return False
        target = [a if b in (1, a) else b if a == 1 or isinstance(b, int) else None for a, b in zip(source, target, strict=True)]
    return merge_shape(node.outputs[0], ir.Shape(target))


def _fix_reshape(scope: Scope, node: ir.Node, known: dict[ir.Value, Array]) -> bool:
    target = ints(input_at(node, 1))
    allowzero = attribute_int(node, "allowzero", 0)
    if target is not None:
        if 0 in target or "allowzero" not in node.attributes or allowzero is None:
            return False
        del node.attributes["allowzero"]
        return True
    target = _target(node, known)
    if target is None:
        return False
    node.attributes.pop("allowzero", None)
    node.replace_input_with(1, new_constant(scope, node, np.array(target, dtype=np.int64)))
    return True


def _target(node: ir.Node, known: dict[ir.Value, Array]) -> list[int] | None:
    """A constant target for a Reshape whose own is not constant."""
    shape, source = dims(node.outputs[0]), dims(node.inputs[0])
    followed = known.get(node.inputs[1]) if node.inputs[1] is not None else None
    target: list[Any] = list(followed.reshape(-1)) if followed is not None else [None] * len(shape or ())
    if not target or (shape is not None and len(shape) != len(target)):
        return None
    for i, size in enumerate(shape or ()):
        if not isinstance(target[i], int) or target[i] == -1:
            target[i] = size if size is not None else target[i]
    if 0 in target or (source is not None and 0 in source):
        return None
    is_open = [i for i, size in enumerate(target) if not isinstance(size, int) or size == -1]
    if len(is_open) > 1 and source is not None:
        for i in list(is_open):
            # A symbol that the input has at the same place is copied.
            if len(is_open) > 1 and isinstance(target[i], str) and i < len(source) and source[i] == target[i]:
                target[i] = 0
                is_open.remove(i)
    if len(is_open) > 1:
        return None
    for i in is_open:
        target[i] = -1
    return [int(size) for size in target]
