"""What Core AI cannot take, or would compute wrongly, said before anything is written."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ...exporter.errors import IsthmusError, Reason
from ...exporter.nodes import module_of, name_of
from ...exporter.ops.coreai_table import PART
from .half import custom_of
from .lowerings import converted
from .lowerings import name_of as overload_of
from .prepare import prepare

_LOOPS = ("cond", "while_loop")
_ASSERTIONS = frozenset("_assert_async _assert_scalar _assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size".split())
_REDUCTIONS = frozenset("sum mean amax amin max min prod any argmax _softmax _log_softmax cumsum topk sort flip expand".split())
_RANK = 8
"""The largest rank that is tried in the tests of this lowering."""


def unsupported(program: ExportedProgram) -> list[Reason]:
    """Every reason why a program cannot become an asset that computes the same, by operator and PyTorch module; repeated ones are merged.

    Args:
        program: As torch.export gave it.
    """
    reasons: dict[Reason, None] = {}
    for name, value in _interface(program):
        if isinstance(value, Tensor) and value.dtype.is_complex:
            reasons[Reason(f"has dtype {_text(value.dtype)}, which Core AI has no inputs and outputs of", name, "give two real ones")] = (
                None
            )
    if reasons:
        return list(reasons)
    try:
        prepared = prepare(program, again=True)
    except Exception as error:  # torch raises what its layers raise
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise IsthmusError(f"torch does not take the program apart: {type(error).__name__}: {line}") from error
    reasons.update(dict.fromkeys(_states(prepared)))  # torch notes them when it takes the program apart
    for node in _calls(prepared.graph_module):
        for what, fix in _refused(node):
            reasons[Reason(what, module_of(node), fix)] = None
    return list(reasons)


def _states(program: ExportedProgram) -> Iterator[Reason]:
    signature = program.graph_signature
    for name in sorted({*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()}):
        yield Reason("the model changes this buffer, and this target has no states", name, "pass the state as an input, and return it")
    for name in sorted(signature.user_inputs_to_mutate.values()):
        yield Reason("the model changes this input in place", name, "compute a new tensor")


def _interface(program: ExportedProgram) -> Iterator[tuple[str, Any]]:
    names = {*program.graph_signature.user_inputs, *program.graph_signature.user_outputs}
    for node in program.graph.nodes:
        if node.name in names:
            yield node.name, node.meta.get("val")


def _calls(module: GraphModule) -> Iterator[Node]:
    """Every call that somebody reads, those in loops and conditions included."""
    for inner in module.modules():
        if isinstance(inner, GraphModule):
            live = {inner.graph.output_node()}
            for node in reversed(inner.graph.nodes):
                if node in live:
                    live.update(node.all_input_nodes)
            yield from (node for node in inner.graph.nodes if node in live and node.op == "call_function")


def _refused(node: Node) -> Iterator[tuple[str, str]]:
    name, target = name_of(node), node.target
    if name in _ASSERTIONS or target is operator.getitem:
        yield from _refused_results(node)
        return
    called = f"operator {overload_of(target)}"
    if (op := custom_of(node)) is not None:
        if not op.has(PART):
            yield f"{called} has no lowering for Core AI", ""
        return
    if isinstance(target, torch._ops.HigherOrderOperator):
        if name not in _LOOPS:
            yield f"{called} is converted by nobody", "use torch.cond or while_loop"
        elif name == "while_loop":
            yield from _refused_condition(node)
        return
    namespace = getattr(target, "namespace", "aten")
    if namespace not in ("aten", "_operator") or overload_of(target) not in converted():
        yield f"{called} is converted by nobody", "write it in other operators"
        return
    for value in _tensors(node):
        if value.dtype in (torch.complex64, torch.complex128):
            yield (
                f"{called} computes in {_text(value.dtype)}, which is not executed on this machine",
                "compute with real and imaginary parts",
            )
        if value.dim() > _RANK:
            yield f"{called} gives a tensor of rank {value.dim()}, expected at most {_RANK}", "join axes"
    if name in _REDUCTIONS and node.all_input_nodes and _rank(node.all_input_nodes[0]) == 0 and (name != "expand" or _rank(node) == 0):
        yield f"{called} of a tensor of rank 0, for which coreai-core 1.0.0b3 ends its process", "leave the call out: it changes nothing"
    if name in _KEYWORDS:
        for what, fix in _KEYWORDS[name](node, _arguments(node)):
            yield f"{called} {what}", fix


def _refused_condition(loop: Node) -> Iterator[tuple[str, str]]:
    """coreai-core 1.0.0b3 on a CPU mistakes what a loop carries for something else, without a word, where the condition reads several:
    `(i < 20) & (abs(x).max() > 1)` overwrites i with a number of x. One that reads one tensor was seen to work.
    """
    condition = getattr(loop.graph.owning_module, str(getattr(loop.args[0], "target", "")), None)
    if isinstance(condition, GraphModule):
        read = [node for node in condition.graph.nodes if node.op == "placeholder" and node.users]
        if len(read) > 1:
            what = f"operator while_loop has a condition that reads {len(read)} of the tensors that it carries, expected one"
            yield what, "carry one number that says whether to go on, or a fixed number of turns"


def _refused_results(node: Node) -> Iterator[tuple[str, str]]:
    if node.target is not operator.getitem or not isinstance(source := node.args[0], Node) or not node.args[1]:
        return
    name = name_of(source)
    if name in ("native_layer_norm", "native_group_norm", "_native_batch_norm_legit_no_training"):
        yield f"operator {overload_of(source.target)} gives a mean or a deviation that is used, and Core AI's has none", "compute it apart"
    if name == "max_pool2d_with_indices":
        yield f"operator {overload_of(source.target)} gives indices that are used, and Core AI's has none", "compute them apart"


def _attention(node: Node, given: dict[str, Any]) -> Iterator[tuple[str, str]]:  # noqa: ARG001 - as its kin
    query, value = given["query"], given["value"]
    if given.get("dropout_p"):
        yield f"with dropout_p={given['dropout_p']}: a random result", "put the module into eval mode"
    if _shape(query)[-1] != _shape(value)[-1]:
        yield f"with values of width {_shape(value)[-1]}, expected that of the queries, {_shape(query)[-1]}", "write it as two products"
    if _rank(query) < 3:
        yield f"with queries of rank {_rank(query)}, expected 3 or more", "add an axis for heads"
    if _rank(query) != 4 and given.get("attn_mask") is not None:
        yield f"with a mask and queries of rank {_rank(query)}, expected 4", "add an axis for heads"


def _convolution(node: Node, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if given.get("transposed") and _rank(node) == 5:
        yield "transposed in three dimensions is converted by nobody", "use an upsampling and a convolution"


def _padding(node: Node, given: dict[str, Any]) -> Iterator[tuple[str, str]]:  # noqa: ARG001 - as its kin
    if any(isinstance(n, int) and n < 0 for n in given.get("padding", ())):
        yield f"with padding={list(given['padding'])}: it may not be negative", "crop with a slice"


def _index_put(node: Node, given: dict[str, Any]) -> Iterator[tuple[str, str]]:  # noqa: ARG001 - as its kin
    if given.get("accumulate"):
        yield "with accumulate=True is converted by nobody", "use scatter_add"


_KEYWORDS: dict[str, Callable[[Node, dict[str, Any]], Iterator[tuple[str, str]]]] = {
    "scaled_dot_product_attention": _attention,
    "convolution": _convolution,
    "index_put": _index_put,
    **dict.fromkeys((f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)), _padding),
}
"""Calls that are converted rightly for some arguments only, by operator: what is wrong, and the fix."""


def _arguments(node: Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _tensors(node: Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, tuple | list) else (value,)) if isinstance(v, Tensor)]


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(_tensors(node)[0].shape)


def _rank(node: Node) -> int:
    found = _tensors(node)
    return found[0].dim() if found else -1


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
