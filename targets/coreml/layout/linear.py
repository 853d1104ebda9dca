"""A linear layer as a 1x1 convolution over (B, C, 1, S).

Before::

    linear 2x6x4 = linear(x, p_weight, p_bias)

After::

    permute 2x8x6 = permute(x, [0, 2, 1])
    reshape 2x8x1x6 = reshape(permute, [2, 8, 1, 6])
    conv2d 2x4x1x6 = conv2d(reshape, p_weight, p_bias)
    reshape_1 2x4x6 = reshape(conv2d, [2, 4, 6])
    permute_1 2x6x4 = permute(reshape_1, [0, 2, 1])

The weight is stored as (out, in, 1, 1). The layer of a weight that is computed at run time stays as it is: the Neural Engine has no
convolution with such weights. Source: https://github.com/apple/ml-ane-transformers.
"""

from __future__ import annotations

from torch.fx import Node

from .enter import entering, leaving
from .graph import Editor, argument, aten, shape_of

TARGETS = (aten.linear.default,)


def obstacle(editor: Editor, node: Node) -> str:
    """Why a layer stays as it is; empty when it can be rewritten."""
    x, weight, bias = node.args[0], node.args[1], argument(node, "bias")
    if editor.parameter(weight) is None:
        return "its weight is computed at run time, and the Neural Engine has no convolution with such weights"
    if len(shape_of(weight)) != 2 or (bias is not None and shape_of(bias) != shape_of(weight)[:1]):
        return f"its weight has rank {len(shape_of(weight))}, or its bias is no vector of the outputs"
    if len(shape_of(x)) < 2:
        return "its input has no batch"
    return "its input is empty" if 0 in (*shape_of(x), *shape_of(weight)) else ""


def linear_as_convolution(editor: Editor) -> None:
    """Rewrites every linear layer whose weight is stored."""
    for node in editor.calls(*TARGETS):
        if obstacle(editor, node):
            continue
        x, weight, bias = node.args[0], node.args[1], argument(node, "bias")
        assert isinstance(x, Node)
        assert isinstance(weight, Node)
        out, channels = shape_of(weight)
        entered = editor.move(node, x, entering(shape_of(x)))
        stored = editor.reshaped(node, weight, (out, channels, 1, 1))
        kept = bias is not None and editor.parameter(bias) is not None
        result = editor.emit(node, aten.conv2d.default, entered, stored, *((bias,) if kept else ()))
        if bias is not None and not kept:
            result = editor.emit(node, aten.add.Tensor, result, editor.channels(node, bias))
        editor.replace(node, editor.move(node, result, leaving(shape_of(x), out)))
