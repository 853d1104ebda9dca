"""Masks that add -40000 where they added minus infinity, or the lowest number of float32.

Before::

    full_like 2x4x6x6 = full_like(scores, -inf, pin_memory=False)
    where 2x4x6x6 = where(mask, scores, full_like)
    softmax 2x4x6x6 = softmax(where, -1)
    scaled_dot_product_attention 2x4x6x8 = scaled_dot_product_attention(q, k, v, mask)

After::

    full_like 2x4x6x6 = full_like(scores, -40000.0, pin_memory=False)
    where 2x4x6x6 = where(mask, scores, full_like)
    softmax 2x4x6x6 = softmax(where, -1)
    full 2x4x6x6 = full([2, 4, 6, 6], 0.0, dtype=float32)
    full_1 2x4x6x6 = full([2, 4, 6, 6], -40000.0, dtype=float32)
    where_1 2x4x6x6 = where(mask, full, full_1)
    amax 2x4x6x1 = amax(where_1, [-1], True)
    eq 2x4x6x1 = eq(amax, 0.0)
    _to_copy 2x4x6x1 = _to_copy(eq, dtype=float32)
    scaled_dot_product_attention 2x4x6x8 = scaled_dot_product_attention(q, k, v, where_1, 0.0, False)
    mul 2x4x6x8 = mul(scaled_dot_product_attention, _to_copy)

exp(-40000) is 0 in every dtype, and float16 holds what is added to scores down to -25000; infinities become NaN where two of them meet.
Only numbers that reach nothing but softmaxes are changed. A softmax of a row that is masked whole has some finite weights then, where
PyTorch's has NaN. An attention gives zeros for such a row, as PyTorch's does (its `_safe_softmax`): where a mask is known when the program
is rewritten, only if there is such a row; the low numbers of a mask of floating-point numbers are numbers, and only -inf is none.
Source: https://machinelearning.apple.com/research/neural-engine-transformers uses -1e4; scores have been seen beyond that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from .graph import Editor, argument, aten, shape_of

MASKED = -40000.0

_LOWEST = torch.finfo(torch.float16).min

_CARRIES = frozenset({
    "add", "where", "masked_fill", "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "unsqueeze", "squeeze", "clone",
    "_to_copy", "slice", "select", "alias", "triu", "tril", "detach", "repeat", "flatten", "contiguous",
})  # fmt: skip
"""Operators whose result masks where what they were given did."""

_SHAPES = _CARRIES - {"add", "where", "masked_fill"}

_NUMBERS = frozenset({"full", "full_like", "masked_fill", "fill", "scalar_tensor", "where", "mul"})
"""Operators that may be given the number itself."""

_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten.scaled_dot_product_attention.default)

_LARGEST = 1 << 22
"""Masks of more elements are not evaluated: they count as computed at run time."""


def finite_masks(editor: Editor) -> None:
    """Rewrites the masks of attentions, and constants, fills and stored tables that only mask."""
    for node in editor.calls(aten.scaled_dot_product_attention.default):
        _attention(editor, node)
    for node in editor.calls():
        if _name(node) in _NUMBERS and _masks(node):
            _bounded(editor, node)
    for node in list(editor.graph.nodes):
        stored = editor.parameter(node)
        if stored is not None and stored.is_floating_point() and _masks(node) and bool((stored.detach() < MASKED).any()):
            node.replace_all_uses_with(editor.constant("mask", stored.detach().clamp(min=MASKED)))


def _bounded(editor: Editor, node: Node) -> None:
    """The same call with its low number raised. What is multiplied has to be flags, as numbers."""
    if _name(node) == "mul" and not _whole(node.args[0]):
        return
    args = tuple(MASKED if isinstance(a, float | int) and not isinstance(a, bool) and a < MASKED else a for a in node.args)
    if args != node.args:
        editor.replace(node, editor.emit(node, node.target, *args, **node.kwargs))  # type: ignore[arg-type]  # fx's arguments are a union


def _attention(editor: Editor, node: Node) -> None:
    mask, dtype = argument(node, "attn_mask"), node.meta["val"].dtype
    if argument(node, "is_causal", False):
        queries, keys = (shape_of(n)[-2] for n in node.args[:2])
        _attend(editor, node, editor.once(("causal", queries, keys, dtype), lambda: _causal(editor, queries, keys, dtype)), None)
        return
    if mask is None or not mask.meta["val"].numel() or (mask.meta["val"].dtype != torch.bool and _finite(editor, mask)):
        return
    known = editor.value(mask, _LARGEST)
    if known is None:
        low = editor.once((mask, "added", dtype), lambda: _added(editor, node, mask))
        _attend(editor, node, low, editor.once((mask, "kept", dtype), lambda: _kept(editor, node, mask, low)))
        return
    boolean = known.dtype == torch.bool
    numbers = torch.zeros(known.shape, dtype=dtype).masked_fill(~known, MASKED) if boolean else known.clamp(min=MASKED)
    some = (known if boolean else known > -math.inf).any(-1, keepdim=True)
    added = editor.once((mask, "added", dtype), lambda: editor.constant("mask", numbers))
    kept = None if bool(some.all()) else editor.once((mask, "kept", dtype), lambda: editor.constant("rows_kept", some.to(dtype)))
    _attend(editor, node, added, kept)


def _causal(editor: Editor, queries: int, keys: int, dtype: torch.dtype) -> Node:
    later = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    return editor.constant("causal_mask", torch.zeros(queries, keys, dtype=dtype).masked_fill(later, MASKED))


def _added(editor: Editor, node: Node, mask: Node) -> Node:
    """What is added to the scores for a mask that is computed at run time."""
    if mask.meta["val"].dtype != torch.bool:
        return editor.emit(node, aten.clamp_min.default, mask, MASKED)
    dtype, sizes = node.meta["val"].dtype, list(shape_of(mask))
    zeros, low = (editor.emit(node, aten.full.default, sizes, number, dtype=dtype) for number in (0.0, MASKED))
    return editor.emit(node, aten.where.self, mask, zeros, low)


def _kept(editor: Editor, node: Node, mask: Node, added: Node) -> Node:
    """1 for each row of a mask that leaves anything, else 0."""
    boolean = mask.meta["val"].dtype == torch.bool
    highest = editor.emit(node, aten.amax.default, added if boolean else mask, [-1], True)
    some = editor.emit(node, aten.eq.Scalar, highest, 0.0) if boolean else editor.emit(node, aten.gt.Scalar, highest, -math.inf)
    return editor.emit(node, aten._to_copy.default, some, dtype=node.meta["val"].dtype)


def _attend(editor: Editor, node: Node, mask: Node, kept: Node | None) -> None:
    """The same attention with a mask that is added, and with zeros for the rows that are masked whole."""
    others = {name: value for name, value in node.kwargs.items() if name not in ("attn_mask", "dropout_p", "is_causal")}
    new = editor.emit(node, node.target, *node.args[:3], mask, argument(node, "dropout_p", 0.0), False, **others)  # type: ignore[arg-type]  # fx's arguments are a union
    editor.replace(node, new if kept is None else editor.emit(node, aten.mul.Tensor, new, kept))


def _masks(node: Node) -> bool:
    """Whether a result is read by softmaxes alone, through what does not change the numbers that matter."""
    return bool(node.users) and all(_masking(user, node) for user in node.users)


def _masking(user: Node, given: Node) -> bool:
    if user.target in _SOFTMAX:
        return user.target is not aten.scaled_dot_product_attention.default or argument(user, "attn_mask") is given
    return user.op == "call_function" and _name(user) in _CARRIES and argument(user, "alpha", 1) == 1 and _masks(user)


def _whole(value: Any) -> bool:
    """Whether a value is made of booleans or integers, or of 1 less these: what differs at all differs by 1."""
    if not isinstance(value, Node):
        return False
    if not value.meta["val"].dtype.is_floating_point:
        return True
    if value.op != "call_function":
        return False
    name, first = _name(value), value.args[0] if value.args else None
    if name == "rsub":
        return bool(value.args[1] == 1) and not value.kwargs and _whole(first)
    if name == "sub":
        return bool(first == 1) and not value.kwargs and _whole(value.args[1])
    return name in _SHAPES and _whole(first)


def _finite(editor: Editor, mask: Node) -> bool:
    """Whether what is added to scores is known to be finite, and to be a number of float16 when `_bounded` is through with it."""
    known = editor.value(mask, _LARGEST)
    if known is not None:
        return bool((known >= _LOWEST).all())
    if mask.op != "call_function":
        return False
    name, args = _name(mask), mask.args
    if name == "full_like":
        return _number(args[1], mask)
    if name == "mul":
        return _whole(args[0]) and _number(args[1], mask)
    if name == "where":
        return all(_finite(editor, n) if isinstance(n, Node) else _number(n, mask) for n in args[1:])
    if not isinstance(args[0], Node):
        return False
    if name == "masked_fill":
        value = args[2]
        return _finite(editor, args[0]) and (_finite(editor, value) if isinstance(value, Node) else _number(value, mask))
    return name in _SHAPES and (not args[0].meta["val"].dtype.is_floating_point or _finite(editor, args[0]))


def _number(value: Any, node: Node) -> bool:
    """Whether a number of a call is one of float16, or becomes one."""
    return isinstance(value, float | int) and (bool(value >= _LOWEST) or (value > -math.inf and _masks(node)))


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else ""
