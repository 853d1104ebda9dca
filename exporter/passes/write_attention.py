"""Attention written out as matrix products and a softmax, for compilers that take the operator in some forms only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ._rewrite import attribute_int, dims, input_at, is_op

_F32 = ir.DataType.FLOAT


@dataclass(frozen=True)
class Written:
    """The nodes that stand for an Attention.

    Attributes:
        keys: Transposes the keys.
        scores: The first product: scaled queries by transposed keys.
        softmax: Its result has the attention weights.
        values: The second product.
    """

    keys: ir.Node
    scores: ir.Node
    softmax: ir.Node
    values: ir.Node


class WriteAttention(ir.passes.InPlacePass):
    """Writes out the Attention nodes that a condition holds for. The softmax computes in float32.

    Given, in float16::

        y = Attention<scale=s>(q, k, v, mask)

    Result::

        q_s = Mul(q, s)
        k_t = Transpose<perm=[0, 1, 3, 2]>(k)
        scores = Add(MatMul(q_s, k_t), mask)
        p = Cast<to=FLOAT16>(Softmax<axis=-1>(Cast<to=FLOAT>(scores)))
        y = MatMul(p, v)

    and with `is_causal=1`, whose query n reads the keys up to n, between the first two::

        ones = ConstantOfShape<value=1>(Shape<start=2, end=4>(MatMul(q_s, k_t)))
        scores = Where(Cast<to=BOOL>(Trilu<upper=0>(ones)), MatMul(q_s, k_t), -inf)

    Args:
        which: Whether a node is to be written out; asked only for those that `writable` takes.
    """

    def __init__(self, which: Callable[[ir.Node], bool]) -> None:
        self._which = which

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph and the bodies of its branches and loops in place."""
        found = [
            (node, graph) for graph in (model.graph, *model.graph.subgraphs()) for node in graph if writable(node) and self._which(node)
        ]
        for node, graph in found:
            write_attention(node, graph, softmax=_F32)
        return ir.passes.PassResult(model, modified=bool(found))


def writable(node: ir.Node) -> bool:
    """Whether `write_attention` can take a node: 4-D tensors of equally many heads, no cache or soft cap, no boolean mask."""
    if not is_op(node, "Attention") or any(v.uses() for v in node.outputs[1:]):
        return False
    softcap = node.attributes.get("softcap")
    if softcap is not None and (softcap.is_ref() or softcap.as_float() != 0):
        return False
    shapes = [dims(node.inputs[i]) for i in range(3)]
    mask = input_at(node, 3)
    return (
        all(shape is not None and len(shape) == 4 for shape in shapes)
        and len({shape[1] for shape in shapes if shape is not None}) == 1
        and all(input_at(node, i) is None for i in range(4, len(node.inputs)))
        and (mask is None or (mask.dtype is not None and mask.dtype.is_floating_point()))
    )


def write_attention(node: ir.Node, graph: ir.Graph, *, softmax: ir.DataType) -> Written:
    """Replaces an Attention node of `graph` that is `writable`.

    Args:
        node: The node; it is removed.
        graph: The graph that the node is in, which gets the scale as a constant.
        softmax: The type in which the softmax computes.
    """
    q, k, v = node.inputs[:3]
    mask = input_at(node, 3)
    assert q is not None
    assert k is not None
    assert v is not None
    assert q.dtype is not None
    q_dims, k_dims, v_dims = dims(q) or [], dims(k) or [], dims(v) or []

    def add(
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        shape: Any,
        attributes: dict[str, Any] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Node:
        made = ir.node(op_type, inputs, attributes or {}, name=f"{node.name}/{name}")
        made.metadata_props.update(node.metadata_props)
        value, to = made.outputs[0], (attributes or {}).get("to")
        value.name, value.shape = made.name, ir.Shape(shape)
        value.type = ir.TensorType(dtype or (ir.DataType(to) if to is not None else inputs[0].dtype or _F32))
        graph.insert_before(node, made)
        return made

    def constant(name: str, number: float) -> ir.Value:
        assert q.dtype is not None
        tensor = ir.tensor(np.array(number, q.dtype.numpy()), name=f"{node.name}/{name}")
        value = ir.Value(name=tensor.name, type=ir.TensorType(q.dtype), shape=ir.Shape([]), const_value=tensor)
        graph.register_initializer(value)
        return value

    attribute = node.attributes.get("scale")
    scale = attribute.as_float() if attribute is not None else 1.0 / math.sqrt(int(q_dims[3] or 0))
    scaled = add("Mul", [q, constant("scale", scale)], "scaled", q_dims).outputs[0]
    keys = add("Transpose", [k], "keys", [*k_dims[:2], k_dims[3], k_dims[2]], {"perm": [0, 1, 3, 2]})
    square = [*q_dims[:3], k_dims[2]]
    scores = add("MatMul", [scaled, keys.outputs[0]], "scores", square)
    weights = scores.outputs[0]
    if attribute_int(node, "is_causal", 0):
        sizes = add("Shape", [weights], "sizes", [2], {"start": 2, "end": 4}, dtype=ir.DataType.INT64).outputs[0]
        one = {"value": ir.tensor(np.ones(1, np.float32))}
        ones = add("ConstantOfShape", [sizes], "ones", square[2:], one, dtype=_F32).outputs[0]
        lower = add("Trilu", [ones], "lower", square[2:], {"upper": 0}).outputs[0]
        read = add("Cast", [lower], "read", square[2:], {"to": int(ir.DataType.BOOL)}).outputs[0]
        weights = add("Where", [read, weights, constant("never", -np.inf)], "causal", square, dtype=q.dtype).outputs[0]
    if mask is not None:
        weights = add("Add", [weights, mask], "masked", square).outputs[0]
    if softmax != q.dtype:
        weights = add("Cast", [weights], "widened", square, {"to": int(softmax)}).outputs[0]
    soft = add("Softmax", [weights], "softmax", square, {"axis": -1})
    weights = soft.outputs[0]
    if softmax != q.dtype:
        weights = add("Cast", [weights], "narrowed", square, {"to": int(q.dtype)}).outputs[0]
    values = add("MatMul", [weights, v], "values", [*q_dims[:3], v_dims[3]])
    old, new = node.outputs[0], values.outputs[0]
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, name
    graph.remove(node, safe=True)
    return Written(keys, scores, soft, values)
