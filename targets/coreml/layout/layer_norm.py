"""Layer norm over the channels of (B, C, 1, S).

Before::

    layer_norm 2x6x8 = layer_norm(x, [8], p_weight, p_bias, 1e-05, False)

After::

    permute 2x8x6 = permute(x, [0, 2, 1])
    reshape 2x8x1x6 = reshape(permute, [2, 8, 1, 6])
    layer_norm_along 2x8x1x6 = layer_norm_along(reshape, 1, p_weight, p_bias, 1e-05)
    reshape_1 2x8x6 = reshape(layer_norm_along, [2, 8, 6])
    permute_1 2x6x8 = permute(reshape_1, [0, 2, 1])

A norm over several axes at the end has them all as channels; a weight or bias that is computed at run time is multiplied and added after
it. Source: https://github.com/apple/ml-ane-transformers/blob/main/ane_transformers/reference/layer_norm.py normalises over axis 1 too;
see `operators` for why it is one operation here.
"""

from __future__ import annotations

import math

from torch.fx import Node

from .enter import LARGEST, entering
from .graph import Editor, argument, aten, shape_of
from .operators import layer_norm_along

TARGETS = (aten.layer_norm.default,)


def obstacle(editor: Editor, node: Node) -> str:  # noqa: ARG001 - as in all rewrites
    """Why a norm, of layers or of roots of mean squares, stays as it is; empty when it can be rewritten."""
    shape, channels = shape_of(node.args[0]), math.prod(argument(node, "normalized_shape"))
    if channels > LARGEST:
        return f"it is over {channels} numbers, and the Neural Engine takes {LARGEST} channels"
    if 0 in shape:
        return "its input is empty"
    return "" if len(shape) > 1 else "its input has no batch"


def layer_norm_over_channels(editor: Editor) -> None:
    """Rewrites every layer norm of 16384 channels or fewer."""
    for node in editor.calls(*TARGETS):
        if obstacle(editor, node):
            continue
        x, weight, bias = node.args[0], argument(node, "weight"), argument(node, "bias")
        assert isinstance(x, Node)
        entry = entering(shape_of(x), len(argument(node, "normalized_shape")))
        entered = editor.move(node, x, entry)
        size = [math.prod(argument(node, "normalized_shape"))]
        # A norm takes what is stored: all of it, or the rest is done after it.
        vectors = [None if n is None or editor.parameter(n) is None else editor.reshaped(node, n, size) for n in (weight, bias)]
        if weight is not None and vectors[0] is None:
            vectors[1] = None
        result = editor.emit(node, layer_norm_along, entered, 1, *vectors, argument(node, "eps"))
        for operator, given, done in ((aten.mul.Tensor, weight, vectors[0]), (aten.add.Tensor, bias, vectors[1])):
            if given is not None and done is None:
                result = editor.emit(node, operator, result, editor.channels(node, given))
        editor.replace(node, editor.move(node, result, entry.inverse()))
