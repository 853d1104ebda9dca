"""Permutations of more axes than Core ML has, where sizes vary: as several transpositions of four.

A patch is put back into a picture through six axes. coremltools rewrites that where all sizes are known
(`expand_high_rank_reshape_and_transpose`); where one varies, it is done here. Two blocks of axes change places at a time, and what stands
before, between and behind is one axis each::

    view (N, h, w, p, q, C) -> permute (0, 5, 1, 3, 2, 4) -> view (N, C, hp, wq)
    view (N, hwpq, C, 1) -> permute (0, 2, 1, 3) -> view (NCh, w, p, q) -> permute (0, 2, 1, 3) -> view (N, C, hp, wq)
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...exporter.quiet import quiet

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

HIGHEST = 5
"""Core ML's tensors have at most so many axes."""


def low_rank(program: ExportedProgram) -> ExportedProgram:
    """The program with these permutations written out; itself when it has none.

    Args:
        program: After `lowerings.decomposed`. It shares its tensors with the one returned, and is not changed.
    """
    if not _chains(program):
        return program
    own = copy.copy(program)
    with quiet():  # torch deprecates what its own copies use
        own._graph_module = copy.deepcopy(program.graph_module)
    for chain in _chains(own):
        _rewrite(chain)
    own.graph_module.recompile()
    return own


@dataclass(frozen=True)
class _Chain:
    """A view, a permutation, perhaps a copy, and a view."""

    first: Node
    order: tuple[int, ...]
    sizes: tuple[Any, ...]
    """Of the first view: integers, and nodes that compute one."""
    last: Node


def _chains(program: ExportedProgram) -> list[_Chain]:
    import torch

    aten = torch.ops.aten
    views = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
    found = []
    for first in program.graph.nodes:
        if first.op != "call_function" or first.target not in views or first.meta["val"].dim() <= HIGHEST:
            continue
        shape = first.meta["val"].shape
        if all(isinstance(size, int) for size in shape):
            continue
        sizes = tuple(size if isinstance(size, int) else given for size, given in zip(shape, first.args[1], strict=True))
        at = _user(first)
        if at is None or at.target != aten.permute.default or any(isinstance(n, int) and n < 0 for n in sizes):
            continue
        axes: Any = at.args[1]
        order = tuple(int(axis) % len(shape) for axis in axes)
        last = _user(at)
        while last is not None and last.target in (aten.clone.default, aten.contiguous.default):
            last = _user(last)
        if last is not None and last.target in views and last.meta["val"].dim() <= HIGHEST:
            found.append(_Chain(first, order, sizes, last))
    return found


def _user(node: Node) -> Node | None:
    """What reads a value, where that is one call."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _rewrite(chain: _Chain) -> None:
    import torch

    aten, graph, last = torch.ops.aten, chain.first.graph, chain.last
    meta = {key: value for key, value in chain.first.meta.items() if key != "val"}

    def emit(target: Any, *args: Any) -> Node:
        with graph.inserting_before(last):
            node = graph.call_function(target, args)
        values = torch.fx.map_arg(args, lambda n: n.meta["val"])
        node.meta = {**meta, "val": target(*values)}
        return node

    def product(axes: Sequence[int]) -> Any:
        result: Any = 1
        for axis in axes:
            size = chain.sizes[axis]
            if isinstance(result, int) and isinstance(size, int):
                result *= size
            elif result == 1:
                result = size
            elif size != 1:
                result = emit(operator.mul, result, size)
        return result

    value: Any = chain.first.args[0]
    order = [axis for axis in chain.order if chain.sizes[axis] != 1]
    now = sorted(order)
    for place in range(len(order)):
        at = now.index(order[place])
        if at == place:
            continue
        end = at + 1
        while end < len(now) and now[end] == order[place + end - at]:
            end += 1
        sizes = [product(axes) for axes in (now[:place], now[place:at], now[at:end], now[end:])]
        varying = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
        if len(varying) == 1:
            sizes[varying[0]] = -1
        value = emit(aten.permute.default, emit(aten.reshape.default, value, sizes), [0, 2, 1, 3])
        now = now[:place] + now[at:end] + now[place:at] + now[end:]
    # The last node stays: a program's outputs go by their nodes' names.
    dropped = last.args[0]
    last.target, last.args = aten.reshape.default, (value, *last.args[1:])
    while dropped is not chain.first:
        assert isinstance(dropped, torch.fx.Node)
        before = dropped.args[0]
        graph.erase_node(dropped)
        dropped = before
    graph.erase_node(chain.first)
