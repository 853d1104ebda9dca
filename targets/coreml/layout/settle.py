"""Takes reshapes and transposes away: each is put off until something needs its result, and most turn out to undo one another.

Before, two layers with something between them (B = 2 pictures, C = 8 channels, S = 6 positions)::

    conv2d 2x8x1x6 = conv2d(x, p_first)
    view 2x8x6 = view(conv2d, [2, 8, 6])
    permute 2x6x8 = permute(view, [0, 2, 1])
    relu 2x6x8 = relu(permute)
    permute_1 2x8x6 = permute(relu, [0, 2, 1])
    view_1 2x8x1x6 = view(permute_1, [2, 8, 1, 6])
    conv2d_1 2x8x1x6 = conv2d(view_1, p_second)

After::

    conv2d 2x8x1x6 = conv2d(x, p_first)
    relu 2x8x1x6 = relu(conv2d)
    conv2d_1 2x8x1x6 = conv2d(relu, p_second)

A value of the graph is kept as a node and a movement that is still to be done (`movement`). Operators for which the order of the axes
does not matter compute on the node, and the movement is handed on; all others have it done first. Where values with different movements
meet, they take that of the operand that looks most like (B, C, 1, S).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from .graph import FINAL, Editor, argument, aten, shape_of
from .movement import Movement, Shape
from .operators import NAMESPACE

_VIEWS = frozenset({
    "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "clone", "contiguous", "alias", "detach", "detach_",
    "lift_fresh_copy",
})  # fmt: skip

ELEMENTWISE = frozenset({
    "abs", "add", "sub", "mul", "div", "neg", "exp", "log", "sqrt", "rsqrt", "square", "reciprocal", "pow", "erf", "sin", "cos", "tanh",
    "sigmoid", "relu", "relu6", "gelu", "silu", "mish", "softplus", "elu", "selu", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid",
    "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "where", "masked_fill", "_to_copy", "to", "floor", "ceil", "round", "sign",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "bitwise_not", "bitwise_and", "bitwise_or", "rsub",
    "expm1", "log1p", "log_sigmoid", "softsign", "isnan", "isinf", "dropout", "addcmul",
})  # fmt: skip
"""Operators of ATen whose result has the shape that their tensors broadcast to, and that treat all elements alike."""

_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "prod"})
_ALONG = frozenset({"softmax", "log_softmax", "_softmax", "_log_softmax", "layer_norm_along"})
_CUTS = frozenset({"split", "split_with_sizes", "chunk", "unbind", "select", "slice", "narrow"})


@dataclass(frozen=True)
class _Value:
    """What a node of the old graph computes: a node of the new one, and what is still to be done to it."""

    node: Node
    movement: Movement


def settle(program: ExportedProgram) -> ExportedProgram:
    """The program with its movements composed, carried past what they do not matter to, and written only where they are needed."""
    return _Settler(Editor(program)).run()


class _Settler:
    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._values: dict[Node, _Value | list[_Value]] = {}
        self._done: dict[tuple[Node, Movement], Node] = {}
        self._outputs: list[Any] = []

    def run(self) -> ExportedProgram:
        for node in list(self._editor.graph.nodes):
            if node.op == "output":
                self._outputs = [self._plain(node, n) if isinstance(n, Node) else n for n in node.args[0]]
            elif node.op != "call_function":
                self._keep(node)
            elif node.target is operator.getitem and isinstance(self._values.get(node.args[0]), list):
                self._values[node] = self._values[node.args[0]][node.args[1]]  # type: ignore[index]  # fx's arguments are a union
            else:
                value = self._handled(node)
                if value is None:
                    plain = {n: self._plain(node, n) for n in node.all_input_nodes}
                    node.args, node.kwargs = torch.fx.map_arg((node.args, node.kwargs), plain.__getitem__)
                    self._keep(node)
                elif node.meta.get(FINAL) and isinstance(value, _Value):
                    done = self._move(node, value.node, value.movement)
                    done.meta[FINAL] = True
                    self._values[node] = _Value(done, Movement.identity(shape_of(done)))
                else:
                    self._values[node] = value
        return self._editor.finish(self._outputs)

    def _keep(self, node: Node) -> None:
        if isinstance(node.meta.get("val"), torch.Tensor):
            self._values[node] = _Value(node, Movement.identity(shape_of(node)))

    def _plain(self, like: Node, node: Node) -> Node:
        """The node that computes what the old node did, all movements done."""
        value = self._values.get(node)
        return node if not isinstance(value, _Value) else self._move(like, value.node, value.movement)

    def _move(self, like: Node, node: Node, movement: Movement) -> Node:
        if movement.is_identity:
            return node
        if (node, movement) not in self._done:
            self._done[node, movement] = self._editor.move(like, node, movement)
        return self._done[node, movement]

    def _handled(self, node: Node) -> _Value | list[_Value] | None:
        if getattr(node.target, "namespace", "") not in ("aten", NAMESPACE) or not node.all_input_nodes or _empty(node):
            return None
        name = node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]  # fx's arguments are a union
        handlers: list[tuple[frozenset[str], Callable[[Node], _Value | list[_Value] | None]]] = [
            (_VIEWS, self._view), (frozenset({"permute", "transpose", "t", "movedim"}), self._permute), (ELEMENTWISE, self._elementwise),
            (_CUTS, self._cut), (frozenset({"cat"}), self._concatenated), (_REDUCTIONS, self._reduced), (_ALONG, self._along),
        ]  # fmt: skip
        return next((handle(node) for names, handle in handlers if name in names), None)

    def _value(self, node: Any) -> _Value | None:
        value = self._values.get(node) if isinstance(node, Node) else None
        return value if isinstance(value, _Value) else None

    def _view(self, node: Node) -> _Value | None:
        if node.meta["val"].dtype != node.args[0].meta["val"].dtype:  # type: ignore[union-attr]  # fx's arguments are a union
            return None  # the bits of the numbers, read as numbers of another dtype
        return self._moved(node, Movement.view(shape_of(node.args[0]), shape_of(node)))

    def _permute(self, node: Node) -> _Value | None:
        shape = shape_of(node.args[0])
        with torch.device("meta"):  # what the operator does to numbered axes, whatever it is called
            numbered = torch.empty(tuple(range(2, len(shape) + 2)))
        order = [size - 2 for size in node.target(numbered, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]  # fx's arguments are a union
        return self._moved(node, Movement.permute(shape, order))

    def _moved(self, node: Node, movement: Movement) -> _Value | None:
        value = self._value(node.args[0])
        if value is None:
            return None
        together = value.movement.then(movement)
        if together is not None:
            return _Value(value.node, together)
        return _Value(self._move(node, value.node, value.movement), movement)

    def _elementwise(self, node: Node) -> _Value | None:
        shape = shape_of(node)
        operands = {n: self._value(n) for n in node.all_input_nodes}
        leaders = [v for v in operands.values() if v is not None and v.movement.target == shape]
        if not leaders or any(v is None for v in operands.values()):
            return None
        leader = max(leaders, key=_likeness)  # the first of the best
        if leader.movement.is_identity:
            return None
        brought: dict[Node, Node] = {}
        for given, value in operands.items():
            assert value is not None
            if not value.movement.target:
                brought[given] = self._plain(node, given)  # with an axis it would count in the dtype of the result
                continue
            pulled = value.movement.then(m) if (m := leader.movement.pulled(value.movement.target)) is not None else None
            if pulled is None:
                return None
            brought[given] = self._move(node, value.node, pulled)
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: brought[n])
        others = {key: given for key, given in kwargs.items() if key != "memory_format"}  # of the old order of the axes
        return _Value(self._editor.emit(node, node.target, *args, **others), leader.movement)  # type: ignore[arg-type]  # fx's arguments are a union

    def _cut(self, node: Node) -> _Value | list[_Value] | None:
        value = self._value(node.args[0])
        if value is None or value.movement.is_identity:
            return None
        axis = argument(node, "dim", 0) % len(value.movement.target)
        axes = value.movement.axes()
        found = axes.leading(axis) if axes is not None else None
        name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]  # fx's arguments are a union
        if axes is None or found is None or (name == "slice" and argument(node, "step", 1) != 1):
            return None
        place, inner = found
        size = value.movement.target[axis]
        dropped = name in ("select", "unbind")
        results: list[_Value] = []
        if name in ("select", "slice", "narrow"):
            start, stop = _bounds(node, name, size)
            parts = [(self._editor.emit(node, aten.slice.Tensor, value.node, place, start * inner, stop * inner), stop - start)]
        else:
            sizes = [1] * size if dropped else [int(v.shape[axis]) for v in node.meta["val"]]
            whole = self._editor.emit(node, aten.split_with_sizes.default, value.node, [n * inner for n in sizes], place)
            parts = [(self._editor.emit(node, operator.getitem, whole, i), n) for i, n in enumerate(sizes)]
        for part, count in parts:
            movement: Movement | None = axes.resized(axis, count)
            assert movement is not None
            if dropped:
                movement = movement.then(Movement.view(movement.target, _without(movement.target, axis)))
            if movement is None:
                return None
            results.append(_Value(part, movement))
        return results if name not in ("select", "slice", "narrow") else results[0]

    def _concatenated(self, node: Node) -> _Value | None:
        operands = [self._value(n) for n in node.args[0]]  # type: ignore[union-attr]  # fx's arguments are a union
        leaders = [v for v in operands if v is not None]
        if not leaders or len(leaders) < len(operands):
            return None
        leader = max(leaders, key=_likeness)
        if leader.movement.is_identity:
            return None
        axis = argument(node, "dim", 0) % len(leader.movement.target)
        axes = leader.movement.axes()
        found = axes.leading(axis) if axes is not None else None
        if axes is None or found is None:
            return None
        brought = []
        for value in operands:
            assert value is not None
            wanted = axes.resized(axis, value.movement.target[axis])
            movement = value.movement.then(wanted.inverse()) if wanted.target == value.movement.target else None
            if movement is None:
                return None
            brought.append(self._move(node, value.node, movement))
        return _Value(self._editor.emit(node, aten.cat.default, brought, found[0]), axes.resized(axis, shape_of(node)[axis]))

    def _reduced(self, node: Node) -> _Value | None:
        value = self._value(node.args[0])
        given = argument(node, "dim")
        if value is None or value.movement.is_identity or given is None:
            return None
        axes, rank = value.movement.axes(), len(value.movement.target)
        dims = [d % rank for d in ([given] if isinstance(given, int) else given)]
        places = [axes.same(d) for d in dims] if axes is not None else [None]
        if axes is None or not dims or None in places or argument(node, "dtype") is not None:
            return None
        movement: Movement | None = value.movement
        for dim in dims:
            movement = axes.resized(dim, 1)
            axes = movement.axes()
            if axes is None or (len(dims) > 1 and not axes.source):
                return None
        assert movement is not None
        if not argument(node, "keepdim", False):
            movement = movement.then(Movement.view(movement.target, shape_of(node)))
        if movement is None:
            return None
        dim = places if not isinstance(given, int) else places[0]
        return _Value(self._editor.emit(node, node.target, value.node, dim, True), movement)  # type: ignore[arg-type]  # fx's arguments are a union

    def _along(self, node: Node) -> _Value | None:
        value = self._value(node.args[0])
        if value is None or value.movement.is_identity:
            return None
        axes = value.movement.axes()
        place = axes.same(argument(node, "dim") % len(value.movement.target)) if axes is not None else None
        if place is None:
            return None
        others = {key: given for key, given in node.kwargs.items() if key != "dim"}
        rest, others = torch.fx.map_arg((node.args[2:], others), lambda n: self._plain(node, n))
        return _Value(self._editor.emit(node, node.target, value.node, place, *rest, **others), value.movement)  # type: ignore[arg-type]  # fx's arguments are a union


def _empty(node: Node) -> bool:
    """Whether a tensor without elements takes part: its axes have no factors."""
    values = [n.meta.get("val") for n in (*node.all_input_nodes, node)]
    tensors = [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]
    return any(isinstance(v, torch.Tensor) and not v.numel() for v in tensors)


def _likeness(value: _Value) -> tuple[int, bool]:
    """How much a node looks like (B, C, 1, S); of equals, one that has yet to be moved comes first."""
    shape = value.movement.source
    return (len(shape) == 4) + (len(shape) == 4 and shape[2] == 1), not value.movement.is_identity


def _bounds(node: Node, name: str, size: int) -> tuple[int, int]:
    if name == "select":
        index = argument(node, "index") % size
        return index, index + 1
    start = argument(node, "start") or 0
    stop = argument(node, "end") if name == "slice" else start + argument(node, "length")
    start, stop, _ = slice(start, size if stop is None else stop).indices(size)
    return start, stop


def _without(shape: Sequence[int], axis: int) -> Shape:
    return tuple(n for i, n in enumerate(shape) if i != axis)
