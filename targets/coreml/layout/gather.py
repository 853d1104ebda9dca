"""A look-up in a table, and a gather of fixed places, as a product with a one-hot matrix.

Before, a table of 10 rows, and places of the second axis that are constants::

    embedding 2x8 = embedding(p_table, y)
    index 2x3x8 = index(x, [None, b_places])

After::

    _to_copy 2 = _to_copy(y, dtype=float32)
    unsqueeze 2x1 = unsqueeze(_to_copy, 1)
    eq 2x10 = eq(unsqueeze, c_rows)
    _to_copy_1 2x10 = _to_copy(eq, dtype=float32)
    linear 2x8 = linear(_to_copy_1, p_table)
    transpose 2x8x6 = transpose(x, 1, -1)
    matmul 2x8x3 = matmul(transpose, c_one_hot)
    transpose_1 2x3x8 = transpose(matmul, 1, -1)

The table is stored transposed. The Neural Engine has no gather. Rows are compared as floating-point numbers, and float16 has no integers
of its own past 2048: larger tables, for which the product would also be dear, stay as they are. So do tables with infinities, which would
spread to all rows; nor may what is gathered from have any. Source: https://github.com/sbryngelson/ANEForge, whose documentation lists
gather among what the engine lacks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .graph import Editor, argument, aten, shape_of

TARGETS = (aten.embedding.default, aten.index_select.default, aten.index.Tensor)

LARGEST = 2048
"""Rows of a table, or places of an axis. Some larger integers are no numbers of float16."""


def obstacle(editor: Editor, node: Node) -> str:
    """Why a look-up stays as it is; empty when it can be rewritten."""
    if node.target is aten.embedding.default:
        table = editor.parameter(node.args[0])
        if table is None:
            return "its table is computed at run time"
        if not 0 < len(table) <= LARGEST:
            return f"its table has {len(table)} rows, and float16 counts to {LARGEST}"
        return "" if bool(table.detach().isfinite().all()) else "its table has infinite numbers"
    source = node.args[0].meta["val"]  # type: ignore[union-attr]  # fx's arguments are a union
    if not source.dtype.is_floating_point or 0 in (*source.shape, *node.meta["val"].shape):
        return "it looks up integers, or nothing"
    axis, places = _indexed(node)
    value = editor.value(places)
    if value is None or value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        return "it has several indices, or indices that are computed at run time"
    most = max(source.shape[axis], value.numel())
    return f"it takes {value.numel()} of {source.shape[axis]} places, and {LARGEST} are the most" if most > LARGEST else ""


def gather_as_product(editor: Editor) -> None:
    """Rewrites look-ups in stored tables, and gathers of constant places of one axis."""
    for node in editor.calls(*TARGETS):
        if not obstacle(editor, node):
            (_embedding if node.target is aten.embedding.default else _fixed)(editor, node)


def _embedding(editor: Editor, node: Node) -> None:
    table, places = node.args[0], node.args[1]
    assert isinstance(table, Node)
    assert isinstance(places, Node)
    rows, dtype = shape_of(table)[0], table.meta["val"].dtype
    number = editor.emit(node, aten._to_copy.default, places, dtype=dtype)
    wide = editor.emit(node, aten.unsqueeze.default, number, len(shape_of(places)))
    count = editor.once(("rows", rows, dtype), lambda: editor.constant("rows", torch.arange(rows, dtype=dtype)))
    one_hot = editor.emit(node, aten.eq.Tensor, wide, count)
    weight = editor.transposed(table)
    editor.replace(node, editor.emit(node, aten.linear.default, editor.emit(node, aten._to_copy.default, one_hot, dtype=dtype), weight))


def _indexed(node: Node) -> tuple[int, Any]:
    """The one axis that is indexed, and its places; places of None when there are several."""
    if node.target is aten.index_select.default:
        return argument(node, "dim") % max(1, len(shape_of(node.args[0]))), argument(node, "index")
    given: list[Any] = argument(node, "indices")
    axes = [axis for axis, places in enumerate(given) if places is not None]
    return axes[0], given[axes[0]] if len(axes) == 1 else None


def _fixed(editor: Editor, node: Node) -> None:
    x, (axis, places) = node.args[0], _indexed(node)
    assert isinstance(x, Node)
    size, dtype, value = shape_of(x)[axis], node.meta["val"].dtype, editor.value(places)
    assert value is not None
    flat = (value.long() % size).reshape(-1)  # places count from the end when they are negative
    one_hot = torch.nn.functional.one_hot(flat, size).T.to(dtype).contiguous()  # (size, places)
    product = editor.along(node, x, axis, editor.constant("one_hot", one_hot))
    if shape_of(product) != shape_of(node):  # the places have axes of their own
        product = editor.emit(node, aten.reshape.default, product, list(shape_of(node)))
    editor.replace(node, product)
