"""Attention head by head, in the form of the Neural Engine.

Before (2 pictures, 2 heads of 4 channels, 6 queries and 5 keys)::

    scaled_dot_product_attention 2x2x6x4 = scaled_dot_product_attention(q, k, v)

After, with q, k and v in (B, C, 1, S), and k transposed to (B, S, 1, C)::

    permute 2x2x4x6 = permute(q, [0, 1, 3, 2])
    reshape 2x8x1x6 = reshape(permute, [2, 8, 1, 6])
    permute_1 2x5x2x4 = permute(k, [0, 2, 1, 3])
    reshape_1 2x5x1x8 = reshape(permute_1, [2, 5, 1, 8])
    permute_2 2x2x4x5 = permute(v, [0, 1, 3, 2])
    reshape_2 2x8x1x5 = reshape(permute_2, [2, 8, 1, 5])
    mul 2x8x1x6 = mul(reshape, 0.5)
    split_with_sizes = split_with_sizes(mul, [4, 4], 1)
    split_with_sizes_1 = split_with_sizes(reshape_1, [4, 4], 3)
    split_with_sizes_2 = split_with_sizes(reshape_2, [4, 4], 1)
    getitem 2x4x1x6 = getitem(split_with_sizes, 0)
    getitem_1 2x5x1x4 = getitem(split_with_sizes_1, 0)
    getitem_2 2x4x1x5 = getitem(split_with_sizes_2, 0)
    einsum 2x5x1x6 = einsum(bkhc,bchq->bkhq, [getitem_1, getitem])
    softmax 2x5x1x6 = softmax(einsum, 1)
    einsum_1 2x4x1x6 = einsum(bchk,bkhq->bchq, [getitem_2, softmax])
    getitem_3 2x4x1x6 = getitem(split_with_sizes, 1)
    getitem_4 2x5x1x4 = getitem(split_with_sizes_1, 1)
    getitem_5 2x4x1x5 = getitem(split_with_sizes_2, 1)
    einsum_2 2x5x1x6 = einsum(bkhc,bchq->bkhq, [getitem_4, getitem_3])
    softmax_1 2x5x1x6 = softmax(einsum_2, 1)
    einsum_3 2x4x1x6 = einsum(bchk,bkhq->bchq, [getitem_5, softmax_1])
    cat 2x8x1x6 = cat([einsum_1, einsum_3], 1)
    reshape_3 2x2x4x6 = reshape(cat, [2, 2, 4, 6])
    permute_3 2x2x6x4 = permute(reshape_3, [0, 1, 3, 2])

The products are those of MIL's einsum that need no transpose; the one of k is all that is left in a laid-out model.
Source: https://machinelearning.apple.com/research/neural-engine-transformers, principles 3 and 4 (smaller heads stay in the cache of the
engine, `bchq,bkhc->bkhq`).
"""

from __future__ import annotations

import math
import operator

from torch.fx import Node

from .graph import FINAL, Editor, argument, aten, shape_of
from .movement import Movement

TARGETS = (aten.scaled_dot_product_attention.default,)


def obstacle(editor: Editor, node: Node) -> str:  # noqa: ARG001 - as in all rewrites
    """Why an attention stays as it is; empty when it can be rewritten. Its mask is added (`masks`) or missing."""
    given = [shape_of(n) for n in node.args[:3]]
    ranks = {len(shape) for shape in (*given, shape_of(node))}
    if ranks not in ({3}, {4}):
        return f"its tensors have ranks {', '.join(map(str, sorted(ranks)))}, and all of them have to be 3 or 4"
    if 0 in (*given[0], *given[1], *given[2]):
        return "its input is empty"
    if argument(node, "dropout_p", 0.0):
        return "it drops weights at random"
    (q, k, v), result = given, shape_of(node)
    if not q[0] == k[0] == v[0] == result[0] or q[:-2] != result[:-2] or k[:-2] != v[:-2]:
        return "its queries, keys and values have batches or heads of different numbers"
    return ""


def attention_by_heads(editor: Editor) -> None:
    """Rewrites every attention of tensors of rank 3 or 4 without dropout, whose mask is added (`masks`) or missing."""
    for node in editor.calls(*TARGETS):
        if not obstacle(editor, node):
            _split(editor, node)


def _split(editor: Editor, node: Node) -> None:
    shape = shape_of(node)
    q, k, v = (_four(editor, node, n) for n in node.args[:3])
    batch, heads, queries, channels = shape_of(q)
    shared, keys, width = shape_of(k)[1], shape_of(k)[2], shape_of(v)[3]  # heads that share keys: grouped queries
    scale = argument(node, "scale")
    q = _channels_first(editor, node, q)
    movement = Movement.permute(shape_of(k), (0, 2, 1, 3)).then(
        Movement.view((batch, keys, shared, channels), (batch, keys, 1, shared * channels))
    )
    k = editor.move(node, k, movement)
    k.meta[FINAL] = True  # one transpose for all heads
    v = _channels_first(editor, node, v)
    q = editor.emit(node, aten.mul.Tensor, q, 1 / math.sqrt(channels) if scale is None else scale)
    parts = [
        editor.emit(node, aten.split_with_sizes.default, whole, [size] * count, axis)
        for whole, size, count, axis in ((q, channels, heads, 1), (k, channels, shared, 3), (v, width, shared, 1))
    ]
    masks = _masks(editor, node)
    results = []
    for head in range(heads):
        q_h, k_h, v_h = (
            editor.emit(node, operator.getitem, part, at) for part, at in zip(parts, (head, *[head * shared // heads] * 2), strict=True)
        )
        scores = editor.emit(node, aten.einsum.default, "bkhc,bchq->bkhq", [k_h, q_h])
        if masks:
            scores = editor.emit(node, aten.add.Tensor, scores, masks[head % len(masks)])
        weights = editor.emit(node, aten.softmax.int, scores, 1)
        results.append(editor.emit(node, aten.einsum.default, "bchk,bkhq->bchq", [v_h, weights]))
    joined = editor.emit(node, aten.cat.default, results, 1)
    leave = Movement.view(shape_of(joined), (batch, heads, width, queries)).then(
        Movement.permute((batch, heads, width, queries), (0, 1, 3, 2))
    )
    assert leave is not None
    editor.replace(node, editor.move(node, joined, leave.then(Movement.view(leave.target, shape))))


def _four(editor: Editor, node: Node, given: object) -> Node:
    """(B, heads, positions, channels); an attention of rank 3 has one head."""
    assert isinstance(given, Node)
    return given if len(shape_of(given)) == 4 else editor.emit(node, aten.unsqueeze.default, given, 1)


def _channels_first(editor: Editor, node: Node, x: Node) -> Node:
    batch, heads, positions, channels = shape_of(x)
    moved = Movement.permute(shape_of(x), (0, 1, 3, 2))
    return editor.move(node, x, moved.then(Movement.view(moved.target, (batch, heads * channels, 1, positions))))


def _masks(editor: Editor, node: Node) -> list[Node]:
    """What is added to the scores of each head, (B, K, 1, Q), or once for all of them; empty when nothing is."""
    mask = argument(node, "attn_mask")
    if mask is None:
        return []
    given = shape_of(mask)
    if len(shape_of(node)) == 3 and len(given) == 3:
        given = (given[0], 1, *given[1:])
    given = (1,) * (4 - len(given)) + given
    wide = editor.move(node, mask, Movement.view(shape_of(mask), given))
    heads = [wide] if given[1] == 1 else [editor.emit(node, aten.slice.Tensor, wide, 1, h, h + 1) for h in range(given[1])]
    return [editor.emit(node, aten.permute.default, h, [0, 3, 1, 2]) for h in heads]
