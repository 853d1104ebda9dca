"""Hand-written scaled dot-product attention, as Attention (opset 23)."""

from __future__ import annotations

import onnx_ir as ir

from ._match import call_it, is_float32, operands
from ._rewrite import attribute_int, attribute_ints, dims, new_node, producer, replace_node, scalar, scopes


class FuseAttention(ir.passes.InPlacePass):
    """Replaces `softmax(scale q k^T + mask) v` over [batch, heads, length, size] by Attention.

    Given::

        f (float[b, 2, 5, 4] q, float[b, 2, 7, 4] k, float[b, 2, 7, 4] v) => (float[b, 2, 5, 4] y) {
            transposed = Transpose <perm: ints = [0, 1, 3, 2]> (k)
            product = MatMul (q, transposed)
            scores = Mul (product, scale)                  # 0.5
            weights = Softmax <axis: int = -1> (scores)
            y = MatMul (weights, v)
        }

    Result::

        f (float[b, 2, 5, 4] q, float[b, 2, 7, 4] k, float[b, 2, 7, 4] v) => (float[b, 2, 5, 4] y) {
            y = Attention <scale: float = 0.5> (q, k, v)
        }

    The scale is a positive constant on the product, on q or on k^T, or a division by one; absent it is 1. An added mask is taken in when
    its last two sizes are the lengths and the first two are 1 or equal to q's. All of batch, heads and sizes must be known to agree: MatMul
    broadcasts and Attention does not. float32 only. Nothing changes below opset 23, or when the scores or weights are used elsewhere.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        for scope in scopes(model):
            if scope.opset >= 23:
                for node in scope.graph:
                    modified |= node.domain == "" and node.op_type == "MatMul" and _fuse(node)
        return ir.passes.PassResult(model, modified)


def _fuse(node: ir.Node) -> bool:
    softmax = producer(node.inputs[0], "Softmax")
    v = node.inputs[1]
    if softmax is None or not _private(softmax.outputs[0]) or attribute_int(softmax, "axis", -1) not in (-1, 3):
        return False
    scores, mask = softmax.inputs[0], None
    total = producer(scores, "Add")
    if total is not None:
        pair = next(((a, b) for a, b in operands(total) if _scaled(a)[0] is not None and producer(_scaled(a)[0], "MatMul")), None)
        if pair is None or not _private(total.outputs[0]):
            return False
        scores, mask = pair
    product, scale = _scaled(scores)
    matmul = producer(product, "MatMul")
    if matmul is None or product is None or not _private(product) or scores is None or not _private(scores):
        return False
    q, q_scale = _scaled(matmul.inputs[0])
    k_t, k_scale = _scaled(matmul.inputs[1])
    scale *= q_scale * k_scale
    if q is None or k_t is None or v is None or scale <= 0 or not is_float32(q, k_t, v):
        return False
    if not _agree(dims(q), dims(k_t), dims(v)) or not (mask is None or _fits(mask, dims(q), dims(v))):
        return False
    k, k_scale_rest = _untransposed(node, k_t)
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    fused = new_node(node, "Attention", inputs, {"scale": scale * k_scale_rest})
    replace_node(node, call_it(fused, "attention"))
    return True


def _private(value: ir.Value) -> bool:
    return not value.is_graph_output() and len(value.uses()) == 1


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """(x, c) of `x * c` or `x / c` with a constant c of one element; (value, 1) when it is neither."""
    node = producer(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    pairs = list(operands(node)) if node.op_type == "Mul" else [(node.inputs[0], node.inputs[1])]
    for x, c in pairs:
        number = scalar(c)
        if number is not None and number > 0 and x is not None and len(x.shape or ()) == 4:
            return x, number if node.op_type == "Mul" else 1.0 / number
    return value, 1.0


def _agree(q: list[int | str | None] | None, k_t: list[int | str | None] | None, v: list[int | str | None] | None) -> bool:
    if q is None or k_t is None or v is None or not len(q) == len(k_t) == len(v) == 4:
        return False
    same = q[:2] == k_t[:2] == v[:2] and q[3] == k_t[2] and k_t[3] == v[2]
    return same and None not in (*q[:2], q[3], v[2])


def _fits(mask: ir.Value, q: list[int | str | None] | None, v: list[int | str | None] | None) -> bool:
    shape = dims(mask)
    if shape is None or q is None or v is None or not 2 <= len(shape) <= 4 or not is_float32(mask):
        return False
    lengths = shape[-2:] == [q[2], v[2]] and None not in shape
    leading = zip(reversed(shape[:-2]), reversed(q[:2]), strict=False)
    return lengths and (len(shape) != 3 or shape[0] in (1, q[1])) and all(size in (1, expected) for size, expected in leading)


def _untransposed(node: ir.Node, k_t: ir.Value) -> tuple[ir.Value, float]:
    """The k for a given k^T, with the scale that stood before the transposition."""
    transpose = producer(k_t, "Transpose")
    source, perm = k_t, [0, 1, 3, 2]
    factor = 1.0
    own = attribute_ints(transpose, "perm") if transpose is not None else None
    if transpose is not None and own is not None and transpose.inputs[0] is not None:
        source, perm = transpose.inputs[0], [own[0], own[1], own[3], own[2]]
        if perm == [0, 1, 2, 3]:
            scaled, factor = _scaled(source)
            return scaled or source, factor
    turned = new_node(node, "Transpose", [source], {"perm": perm})
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, turned)
    shape = dims(k_t) or []
    turned.outputs[0].shape = ir.Shape([*shape[:2], shape[3], shape[2]])
    turned.outputs[0].dtype = ir.DataType.FLOAT
    return turned.outputs[0], factor
