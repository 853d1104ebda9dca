"""Branches and loops: `torch.cond`, `while_loop` and `scan` as `cond` and `while_loop` of MIL.

coremltools' front end for exported programs refuses them (coremltools 9.0, `InternalTorchIRBlock.from_exir_block`; drop this file when it
does not). Here their subgraphs are taken out of the program before it reads it: a call of one of them becomes a call of one function,
whose node carries the subgraphs along, and whose lowering converts them into blocks of MIL::

    y = higher_order.cond(pred, true_graph, false_graph, (x, w))  ->  y = isthmus_control_flow(pred, x, w)   meta: the subgraphs
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...exporter.errors import IsthmusError, Reason, UnsupportedError

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

OPERATORS = ("cond", "while_loop", "scan")
"""The names of torch's higher-order operators that are lowered."""

_KEY = "isthmus_control_flow"

Var = Any
"""A variable of MIL (`coremltools.converters.mil.mil.Var`); coremltools has no types."""


def isthmus_control_flow(*values: object) -> None:  # noqa: ARG001 - a graph passes what the lowering reads
    """Stands for a branch or a loop in a graph that is being converted; coremltools finds the lowering by this name. Never called."""
    raise AssertionError("a graph with this function is converted, not run")


def is_control_flow(node: Node) -> bool:
    """Whether a node calls one of `OPERATORS`."""
    import torch

    return isinstance(node.target, torch._ops.HigherOrderOperator) and str(node.target.name()) in OPERATORS  # type: ignore[no-untyped-call]  # untyped


def subgraphs(node: Node) -> list[GraphModule]:
    """The subgraphs of a call of `OPERATORS`, in the order of its arguments."""
    import torch

    owner = node.graph.owning_module
    assert owner is not None
    named = [a for a in node.args if isinstance(a, torch.fx.Node) and a.op == "get_attr"]
    return [graph for a in named if isinstance(graph := owner.get_submodule(str(a.target)), torch.fx.GraphModule)]


def take_out(module: GraphModule) -> None:
    """Replaces every branch and loop of a graph, and of the subgraphs inside, as the module's text shows. Changes the graph in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_control_flow(node):
            continue
        inner = subgraphs(node)
        for subgraph in inner:
            for other in subgraph.graph.nodes:  # what is computed inside belongs to the module of the call
                other.meta.setdefault("debug_handle", node.meta.get("debug_handle"))
            take_out(subgraph)
        construct, values = _CONSTRUCTS[str(node.target.name())](node, inner)
        with graph.inserting_before(node):
            replaced = graph.call_function(isthmus_control_flow, tuple(values))
        replaced.meta = {**node.meta, _KEY: construct}
        holders = [a for a in node.all_input_nodes if a.op == "get_attr"]
        node.replace_all_uses_with(replaced)
        graph.erase_node(node)
        for holder in holders:
            if not holder.users:
                graph.erase_node(holder)


def register() -> None:
    """Registers the lowering with coremltools' torch front end; calling it again changes nothing."""
    from coremltools.converters.mil import register_torch_op

    def lower(context: Any, node: Any) -> None:
        construct: _Construct = node.meta[_KEY]
        results = construct.emit(context, [_value(context, given) for given in node.inputs])
        context.add(tuple(results), torch_name=node.name)

    lower.__name__ = isthmus_control_flow.__name__
    register_torch_op(lower, override=True)


@dataclass(frozen=True)
class _Construct(ABC):
    """A branch or a loop, with what its values are at run time left open."""

    graphs: Sequence[GraphModule]

    @abstractmethod
    def emit(self, context: Any, values: list[Var]) -> Sequence[Var]:
        """Emits the operations, and gives the results."""


class _Cond(_Construct):
    def emit(self, context: Any, values: list[Var]) -> Sequence[Var]:
        predicate, *operands = values

        def branch(graph: GraphModule) -> Callable[[], tuple[Var, ...]]:
            return lambda: tuple(_apart(v, operands) for v in _inline(context, graph, operands))

        on, off = self.graphs
        results = _mil().cond(pred=_scalar(predicate, "bool"), _true_fn=branch(on), _false_fn=branch(off))
        return results if isinstance(results, list | tuple) else (results,)


@dataclass(frozen=True)
class _While(_Construct):
    carried: int

    def emit(self, context: Any, values: list[Var]) -> Sequence[Var]:
        condition, body = self.graphs
        kinds = _placeholders(body)[: self.carried]
        start = [_coerced(v, kind) for v, kind in zip(values[: self.carried], kinds, strict=True)]
        read = values[self.carried :]

        def again(*carried: Var) -> Var:
            (result,) = _inline(context, condition, [*carried, *read])
            return _scalar(result, "bool")

        def once(*carried: Var) -> tuple[Var, ...]:
            results = _inline(context, body, [*carried, *read])
            return tuple(_apart(_coerced(v, kind), [*carried, *read]) for v, kind in zip(results, kinds, strict=True))

        results = _mil().while_loop(_cond=again, _body=once, loop_vars=tuple(start))
        return results if isinstance(results, list | tuple) else (results,)


@dataclass(frozen=True)
class _Scan(_Construct):
    """A `while_loop` over the slices of axis 0: the slices are gathered, and the outputs scattered into tensors of zeros."""

    carried: int
    sequences: int

    def emit(self, context: Any, values: list[Var]) -> Sequence[Var]:
        (step,) = self.graphs
        kinds, results = _placeholders(step)[: self.carried], _results(step)
        start = [_coerced(v, kind) for v, kind in zip(values[: self.carried], kinds, strict=True)]
        xs = values[self.carried : self.carried + self.sequences]
        read = values[self.carried + self.sequences :]
        length = xs[0].shape[0]
        outputs = [r.meta["val"] for r in results[self.carried :]]
        varying = not all(isinstance(size, int | np.integer) for size in (length, *(s for v in outputs for s in v.shape)))
        if varying:
            what = "a scan over a length that varies, or with outputs whose sizes do, cannot be written as a loop of Core ML"
            raise UnsupportedError("the program cannot be converted", reasons=[Reason(what, fix="export with --shapes fixed")])
        kept = [_mil().fill(shape=(int(length), *map(int, v.shape)), value=_ZEROS[_kind(v)]) for v in outputs]

        def once(i: Var, *rest: Var) -> tuple[Var, ...]:
            carried, written = rest[: self.carried], rest[self.carried :]
            at = _mil().expand_dims(x=i, axes=[0])
            slices = [_mil().squeeze(x=_mil().gather(x=x, indices=at, axis=0), axes=[0]) for x in xs]
            found = _inline(context, step, [*carried, *slices, *read])
            after = [_apart(_coerced(v, kind), [*carried, *read]) for v, kind in zip(found[: self.carried], kinds, strict=True)]
            rows = [_mil().expand_dims(x=_coerced(v, kind), axes=[0]) for v, kind in zip(found[self.carried :], outputs, strict=True)]
            filled = [_mil().scatter(data=w, indices=at, updates=r, axis=0, mode="update") for w, r in zip(written, rows, strict=True)]
            return (_mil().add(x=i, y=1), *after, *filled)

        _, *ended = _mil().while_loop(
            _cond=lambda i, *rest: _mil().less(x=i, y=int(length)),  # noqa: ARG005 - MIL passes every carried value
            _body=once,
            loop_vars=(_mil().const(val=np.int32(0)), *start, *kept),
        )
        return list(ended)


def _cond(node: Node, graphs: list[GraphModule]) -> tuple[_Construct, list[Any]]:
    predicate, _, _, operands = node.args
    return _Cond(graphs), [predicate, *operands]  # type: ignore[misc]  # fx's arguments are a union


def _while_loop(node: Node, graphs: list[GraphModule]) -> tuple[_Construct, list[Any]]:
    _, _, carried, read = node.args
    return _While(graphs, len(carried)), [*carried, *read]  # type: ignore[arg-type,misc]  # fx's arguments are a union


def _scan(node: Node, graphs: list[GraphModule]) -> tuple[_Construct, list[Any]]:
    _, start, sequences, read = node.args
    return _Scan(graphs, len(start), len(sequences)), [*start, *sequences, *read]  # type: ignore[arg-type,misc]  # fx's arguments are a union


_CONSTRUCTS: Mapping[str, Callable[[Node, list[GraphModule]], tuple[_Construct, list[Any]]]] = {
    "cond": _cond,
    "while_loop": _while_loop,
    "scan": _scan,
}
_ZEROS = {"fp32": np.float32(0), "int32": np.int32(0)}


def _mil() -> Any:
    """MIL's builder, which has no types."""
    from coremltools.converters.mil import Builder

    return Builder


def _inline(context: Any, graph: GraphModule, values: Sequence[Var]) -> list[Var]:
    """Converts a subgraph into the block that is being built. Its names are its own: a frame of the context holds them."""
    from coremltools.converters.mil.frontend.torch.internal_graph import InternalTorchIRNode
    from coremltools.converters.mil.frontend.torch.ops import convert_single_node

    given = iter(values)
    context.push()
    try:
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                context.add(next(given), torch_name=node.name)
            elif node.op == "get_attr":
                context.add(_mil().const(val=getattr(graph, str(node.target)).detach().cpu().numpy()), torch_name=node.name)
            elif node.op == "call_function":
                convert_single_node(context, InternalTorchIRNode.from_exir_node(node))
        return [_value(context, node.name if hasattr(node, "name") else node) for node in _results(graph)]
    finally:
        context.pop()


def _placeholders(graph: GraphModule) -> list[Any]:
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


def _results(graph: GraphModule) -> list[Any]:
    (last,) = (node for node in graph.graph.nodes if node.op == "output")
    (results,) = last.args
    return list(results) if isinstance(results, list | tuple) else [results]


def _value(context: Any, given: Any) -> Var:

    if isinstance(given, str):
        return context[given]
    if isinstance(given, bool | int | float):
        return _mil().const(val=given)
    raise IsthmusError(f"a branch or loop is given a {type(given).__name__}, expected a tensor or a number")


def _scalar(value: Var, dtype: str) -> Var:
    """A value of one element as a scalar, which is what MIL decides by."""
    return _cast(_mil().squeeze(x=value, axes=list(range(value.rank))) if value.rank else value, dtype)


def _kind(value: Any) -> str:
    """The type of MIL that a tensor of torch has while a program is converted."""
    dtype = str(getattr(value, "dtype", "torch.int64"))
    return "fp32" if "float" in dtype else "bool" if dtype == "torch.bool" else "int32"


def _coerced(value: Var, like: Any) -> Var:
    """The value in the type and rank that torch gives it: what a loop carries has the same before and after."""
    rank = getattr(like, "ndim", 0)
    if value.rank != rank:
        value = _scalar(value, _kind(like)) if rank == 0 else _mil().reshape(x=value, shape=[1] * rank)
    return _cast(value, _kind(like))


def _cast(value: Var, dtype: str) -> Var:
    from coremltools.converters.mil.mil import types

    return value if types.builtin_to_string(value.dtype) == dtype else _mil().cast(x=value, dtype=dtype)


def _apart(value: Var, outside: Sequence[Var]) -> Var:
    """The value as one that the block computes itself."""
    return _mil().identity(x=value) if any(value is other for other in outside) else value
