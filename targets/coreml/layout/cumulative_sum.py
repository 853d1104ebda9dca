"""A cumulative sum as a product with a triangular matrix of ones.

Before::

    cumsum 2x6x8 = cumsum(x, 1)

After::

    transpose 2x8x6 = transpose(x, 1, -1)
    matmul 2x8x6 = matmul(transpose, c_triangle)
    transpose_1 2x6x8 = transpose(matmul, 1, -1)

The Neural Engine has no cumulative sum. The matrix has as many elements as the axis has pairs: longer axes than 2048 stay as they are, and
so do integers, which float16 would round. An infinite element makes NaN of all sums of its row, not only of those after it.
Source: https://github.com/sbryngelson/ANEForge, whose documentation lists cumsum among what the engine lacks.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from .graph import Editor, argument, aten, shape_of

TARGETS = (aten.cumsum.default,)

LARGEST = 2048


def obstacle(editor: Editor, node: Node) -> str:  # noqa: ARG001 - as in all rewrites
    """Why a sum stays as it is; empty when it can be rewritten."""
    given = node.args[0].meta["val"]  # type: ignore[union-attr]  # fx's arguments are a union
    if not given.dtype.is_floating_point or node.meta["val"].dtype != given.dtype:
        return "it sums integers, or numbers of another dtype than its own"
    if not given.dim() or 0 in given.shape:
        return "its input has no axis, or is empty"
    size = given.shape[argument(node, "dim")]
    return f"the axis has {size} elements, and the matrix would have {size * size}" if size > LARGEST else ""


def cumulative_sum_as_product(editor: Editor) -> None:
    """Rewrites every cumulative sum of floating-point numbers over an axis of at most 2048."""
    for node in editor.calls(*TARGETS):
        if obstacle(editor, node):
            continue
        x, dtype = node.args[0], node.meta["val"].dtype
        assert isinstance(x, Node)
        axis = argument(node, "dim") % len(shape_of(x))
        editor.replace(node, editor.along(node, x, axis, _triangle(editor, shape_of(x)[axis], dtype)))


def _triangle(editor: Editor, size: int, dtype: torch.dtype) -> Node:
    """(size, size): column j has ones in its rows to j."""
    return editor.once(
        ("triangle", size, dtype), lambda: editor.constant("triangle", torch.ones(size, size, dtype=torch.bool).triu().to(dtype))
    )
