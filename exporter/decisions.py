"""Which calls of a traced program have to be exact for its decisions to be those of PyTorch.

A rounding, a comparison or an argmin turns where its operands are a step of float16 apart, and then an integer is another one. So these
calls stay in float32 where a program is lowered to a narrower type:

1. decisions on floats, and what becomes their operand element by element;
2. the product that an argmin, argmax or top-k chooses from, such as the distances to a codebook, and what becomes its operand element by
   element;
3. floats computed element by element from integers and booleans alone, such as what codes stand for.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .nodes import name_of

DECISIONS = frozenset(
    """eq ne lt le gt ge floor ceil round trunc sign remainder fmod floor_divide argmax argmin topk sort bucketize searchsorted""".split()
)
PICKS = frozenset("argmax argmin topk sort".split())
_PRODUCTS = frozenset("mm bmm addmm baddbmm matmul linear einsum".split())
_THROUGH = frozenset(
    """add sub rsub mul div neg abs square relu minimum maximum clamp clamp_min clamp_max sigmoid tanh sum mean pow
    view _unsafe_view reshape permute transpose t unsqueeze squeeze expand slice select split split_with_sizes chunk unbind cat stack clone
    alias copy index index_select gather embedding flip repeat tile getitem where contiguous to _to_copy flatten unflatten movedim
    detach""".split()
)
_OF_INTEGERS = _THROUGH - frozenset("sigmoid tanh pow index index_select gather embedding".split())


def exact_calls(graph: Graph) -> set[Node]:
    """The calls that the module's text names, of a graph of ATen operators with their values in `meta["val"]`."""
    exact: set[Node] = set()
    for node in graph.nodes:
        if not _decides(node):
            continue
        reached = _operands([node])
        exact |= reached
        if name_of(node) in PICKS:
            products = [p for n in reached for p in n.all_input_nodes if name_of(p) in _PRODUCTS and _has_float(p)]
            exact |= _operands(products)
    of_integers: set[Node] = set()
    for node in graph.nodes:  # operands come before what reads them
        if node.op == "call_function" and _has_float(node) and _is_of_integers(node, of_integers):
            of_integers.add(node)
    return exact | of_integers


def _operands(start: Iterable[Node]) -> set[Node]:
    """The given calls, and the calls that become their operands through what works element by element or moves elements."""
    waiting = list(start)
    seen = set(waiting)
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node.op == "call_function" and node not in seen and name_of(node) in _THROUGH and _has_float(node):
                seen.add(node)
                waiting.append(node)
    return seen


def _decides(node: Node) -> bool:
    if node.op != "call_function" or not any(_has_float(a) for a in node.all_input_nodes):
        return False
    if name_of(node) in ("_to_copy", "to"):
        return not _has_float(node)
    return name_of(node) in DECISIONS


def _is_of_integers(node: Node, known: set[Node]) -> bool:
    floats = [a for a in node.all_input_nodes if _has_float(a)]
    if name_of(node) in ("_to_copy", "to"):
        return not floats or all(a in known for a in floats)
    calls = [a for a in floats if a.op == "call_function"]
    return name_of(node) in _OF_INTEGERS and bool(calls) and all(a in known for a in calls) and not _reads_an_input(node)


def _reads_an_input(node: Node) -> bool:
    """Whether a float comes from outside. Weights and buffers are `get_attr` or begin with the prefixes that torch.export gives them."""
    return any(a.op == "placeholder" and _has_float(a) and not a.name.startswith(("p_", "b_", "c_")) for a in node.all_input_nodes)


def _has_float(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(v, Tensor) and v.dtype.is_floating_point and v.dtype != torch.float64 for v in values)
