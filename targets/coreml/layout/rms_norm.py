"""RMS norm over the channels of (B, C, 1, S), for every number of float16.

Before::

    rms_norm 2x6x8 = rms_norm(x, [8], p_weight, 1e-06)

After, with the root of epsilon, 0.001, as the least that anything is divided by::

    permute 2x8x6 = permute(x, [0, 2, 1])
    reshape 2x8x1x6 = reshape(permute, [2, 8, 1, 6])
    abs 2x8x1x6 = abs(reshape)
    amax 2x1x1x6 = amax(abs, [1], True)
    clamp_min 2x1x1x6 = clamp_min(amax, 0.001)
    div 2x8x1x6 = div(reshape, clamp_min)
    mul 2x8x1x6 = mul(div, div)
    mean 2x1x1x6 = mean(mul, [1], True)
    div_1 2x1x1x6 = div(c_rms_norm_bound, clamp_min)
    mul_1 2x1x1x6 = mul(div_1, div_1)
    add 2x1x1x6 = add(mean, mul_1)
    rsqrt 2x1x1x6 = rsqrt(add)
    mul_2 2x8x1x6 = mul(div, rsqrt)
    mul_3 2x8x1x6 = mul(mul_2, p_weight)
    reshape_1 2x8x6 = reshape(mul_3, [2, 8, 6])
    permute_1 2x6x8 = permute(reshape_1, [0, 2, 1])

With m = max(max |x|, sqrt(eps)), x / sqrt(mean(x^2) + eps) = (x / m) / sqrt(mean((x / m)^2) + (sqrt(eps) / m)^2): the same number, and no
intermediate above 1 but the root's reciprocal, which is sqrt(C) at most. A row of zeros divides by the root of epsilon and gives zeros.
Without the division, squares leave float16's range at |x| > 255; with the division by max |x| alone, as coremltools writes it, a row of
zeros is NaN. Below eps = 2^-28 the bound is 2^-14, the smallest normal number of float16, and its share of the sum is scaled to eps once
more; that holds in float16 down to 2^-42, about 2e-13. Source: https://huggingface.co/blog/anemll/anemll-style-rms-ane describes the
fault.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from .enter import entering
from .graph import Editor, argument, aten, shape_of
from .layer_norm import obstacle

__all__ = ["TARGETS", "obstacle", "safe_rms_norm"]

TARGETS = (aten.rms_norm.default,)

_NORMAL = 2.0**-14
"""The smallest normal number of float16."""


def safe_rms_norm(editor: Editor) -> None:
    """Rewrites every RMS norm of 16384 channels or fewer."""
    for node in editor.calls(*TARGETS):
        if obstacle(editor, node):
            continue
        x, weight, eps = node.args[0], argument(node, "weight"), argument(node, "eps")
        assert isinstance(x, Node)
        dtype = node.meta["val"].dtype
        root = math.sqrt(torch.finfo(dtype).eps if eps is None else eps)  # without an epsilon PyTorch takes that of the dtype
        least = max(root, _NORMAL)
        constant = _constant(editor, least, dtype)
        entry = entering(shape_of(x), len(argument(node, "normalized_shape")))
        entered = editor.move(node, x, entry)
        largest = editor.emit(node, aten.amax.default, editor.emit(node, aten.abs.default, entered), [1], True)
        bound = editor.emit(node, aten.clamp_min.default, largest, least)
        small = editor.emit(node, aten.div.Tensor, entered, bound)
        square = editor.emit(node, aten.mean.dim, editor.emit(node, aten.mul.Tensor, small, small), [1], True)
        share = editor.emit(node, aten.div.Tensor, constant, bound)
        if root < least:
            share = editor.emit(node, aten.mul.Tensor, share, root / least)
        total = editor.emit(node, aten.add.Tensor, square, editor.emit(node, aten.mul.Tensor, share, share))
        result = editor.emit(node, aten.mul.Tensor, small, editor.emit(node, aten.rsqrt.default, total))
        if weight is not None:
            result = editor.emit(node, aten.mul.Tensor, result, editor.channels(node, weight))
        editor.replace(node, editor.move(node, result, entry.inverse()))


def _constant(editor: Editor, number: float, dtype: torch.dtype) -> Node:
    return editor.once(("rms_norm_bound", number, dtype), lambda: editor.constant("rms_norm_bound", torch.tensor(number, dtype=dtype)))
