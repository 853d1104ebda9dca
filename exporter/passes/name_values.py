"""Readable names: every node and value says which PyTorch module and operator it belongs to."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

import onnx_ir as ir

from ..op import DOMAIN
from ._rewrite import MADE_BY_PASS, ORIGIN, Array, constant
from .scope import Origin, module_of, operator_of


class NameValues(ir.passes.InPlacePass):
    """Names nodes and values `MODULE/OPERATOR`, after the PyTorch module path and the operator called in it.

    Given::

        f (float[2, 4] x) => (float[2, 8] y) <float[4, 8] attn.qkv.weight.T, float[8] attn.qkv.bias> {
            val_7 = MatMul (x, attn.qkv.weight.T)      # made for the call `linear_1` in module `attn.qkv`
            linear_1 = Add (val_7, attn.qkv.bias)      # the same call
            y = Relu (linear_1)                        # module `act`
        }

    Result::

        f (float[2, 4] x) => (float[2, 8] y) <float[4, 8] attn.qkv.weight.T, float[8] attn.qkv.bias> {
            attn.qkv/linear/MatMul = MatMul (x, attn.qkv.weight.T)
            attn.qkv/linear = Add (attn.qkv/linear/MatMul, attn.qkv.bias)
            y = Relu (attn.qkv/linear)                 # the node is called `act/relu`
        }

    The last node of a call carries the call's name, those before it add their ONNX operator. A module that makes a call several times
    counts on: `blocks.0/mul`, `blocks.0/mul_1`. Nodes of several outputs add `.0`, `.1`, … to the values. Constants that passes made are
    called after their contents (`const/int64_-1_16_64`) or, when those are long, after the place of their use. The names of graph inputs
    and outputs and of parameters are not changed. All names are unique in the model. Nodes of unknown origin are named after
    their ONNX operator.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        graphs = [model.graph, *model.graph.subgraphs()]
        used = _kept_names(graphs)
        modified = _name_constants(model.graph, used)
        modified |= _name_nodes(graphs, used)
        for function in model.functions.values():
            if function.domain == DOMAIN:
                continue  # our operators' bodies have names of their own
            inner = [function.graph, *function.graph.subgraphs()]
            modified |= _name_nodes(inner, _kept_names(inner))
        return ir.passes.PassResult(model, modified)


def _kept_names(graphs: list[ir.Graph]) -> set[str]:
    kept: set[str] = set()
    for graph in graphs:
        kept.update(v.name for v in (*graph.inputs, *graph.outputs) if v.name)
        kept.update(v.name for v in graph.initializers.values() if v.name and MADE_BY_PASS not in v.meta)
    return kept


def _unique(name: str, used: set[str]) -> str:
    candidate, count = name, 0
    while candidate in used:
        count += 1
        candidate = f"{name}_{count}"
    used.add(candidate)
    return candidate


def _rename(value: ir.Value, name: str) -> bool:
    if value.name == name:
        return False
    value.name = name
    return True


def _name_constants(graph: ir.Graph, used: set[str]) -> bool:
    made = [value for value in graph.initializers.values() if MADE_BY_PASS in value.meta and not value.is_graph_output()]
    names = [_unique(_constant_name(value), used) for value in made]
    if all(value.name == name for value, name in zip(made, names, strict=True)):
        return False
    ir.convenience.rename_values(made, names)
    return True


def _constant_name(value: ir.Value) -> str:
    array: Array | None = constant(value, 64)
    if array is not None and array.size <= 8:
        text = "_".join(re.sub(r"[^\w.+-]", "", str(item)) for item in array.reshape(-1)) or "empty"
        return f"const/{array.dtype}_{text}" if array.ndim else f"const/{array.dtype}.{text}"
    origin = value.meta.get(ORIGIN)
    where = _joined(origin.module, origin.operator) if isinstance(origin, Origin) else ""
    return _joined(where, "const")


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _all_nodes(graphs: list[ir.Graph]) -> Iterator[ir.Node]:
    for graph in graphs:
        yield from graph


def _name_nodes(graphs: list[ir.Graph], used: set[str]) -> bool:
    nodes = list(_all_nodes(graphs))
    calls: dict[object, list[ir.Node]] = defaultdict(list)
    for node in nodes:
        origin = node.meta.get(ORIGIN)
        calls[(origin.module, origin.call) if isinstance(origin, Origin) else id(node)].append(node)
    names: dict[ir.Node, str] = {}
    taken: set[str] = set(used)
    for group in calls.values():
        last = group[-1]
        base = _unique(_joined(module_of(last), operator_of(last)), taken)
        names[last] = base
        for node in group[:-1]:
            names[node] = _unique(f"{base}/{node.op_type}", taken)
    modified = False
    kept = {value for graph in graphs for value in (*graph.inputs, *graph.outputs)}
    for node in nodes:
        name = names[node]
        if node.name != name:
            node.name, modified = name, True
        for i, value in enumerate(node.outputs):
            if value not in kept and value.name != "":
                modified |= _rename(value, name if len(node.outputs) == 1 else f"{name}.{i}")
    return modified
