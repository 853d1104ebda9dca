"""Which calls of a program nobody lowers rightly to Core ML: the guard before every conversion.

coremltools 9.0 converts an operator by its name, and drops keywords of some without a word. What it lacks or gets wrong is in `lowerings`;
what is in neither is refused here: each operator with its keyword and the PyTorch modules that call it, and all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ...exporter.errors import Reason
from ...exporter.op import DOMAIN, OPS
from .control_flow import is_control_flow
from .lowerings import decomposed, kind_of, known_kinds, lowered_kinds

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

HIGHEST_RANK = 5
"""Core ML's tensors have at most so many axes."""

LARGEST_INTEGER = 2**31 - 1
"""Core ML's integers have 32 bits."""

DROPPED: dict[str, frozenset[str]] = {
    kind: frozenset(keywords.split())
    for kind, keywords in {
        "add": "alpha",
        "arange": "dtype",
        "arange.start": "dtype",
        "arange.start_step": "dtype",
        "cumprod": "dtype",
        "empty.memory_format": "dtype",
        "empty_like": "dtype",
        "eye": "dtype",
        "eye.m": "dtype",
        "full_like": "dtype",
        "linalg_matrix_norm": "dtype",
        "linalg_norm": "dtype",
        "linalg_norm.ord_str": "dtype",
        "linalg_vector_norm": "dtype",
        "linspace": "dtype",
        "mean": "dtype",
        "mean.dim": "dtype",
        "new_empty": "dtype",
        "new_zeros": "dtype",
        "rsub": "alpha",
        "scaled_dot_product_attention": "enable_gqa",
        "searchsorted": "out_int32 sorter",
        "sub": "alpha",
        "sum": "dtype",
        "sum.dim_intlist": "dtype",
        "zeros": "dtype",
        "zeros_like": "dtype",
    }.items()
}
"""The keywords that coremltools 9.0 does not read, by kind of operator (`lowerings.kind_of`), and that change what is computed.

From `coremltools/converters/mil/frontend/torch/ops.py`: a keyword is read where the function of the operator names it
(`_get_kwinputs`). `tests/targets/coreml/test_support.py` reads that file, and fails when it says something else.
"""

NO_EFFECT = frozenset("device generator implicit layout memory_format non_blocking output_size path pin_memory sparse_grad".split())
"""Keywords that change no number: where and how a tensor is kept, and hints."""

_RANDOM = frozenset(
    {"bernoulli", "bernoulli.p", "multinomial", "normal", "rand", "rand_like", "randint", "randint.low", "randint_like"}
    | {"randn", "randn_like", "randperm", "rrelu_with_noise", "uniform"}
)

_RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "flatten.using_ints", "unflatten"})
_MOVES = frozenset({"permute", "transpose", "movedim", "swapaxes", "t"})
_COPIES = frozenset({"clone", "contiguous", "alias", "detach"})


def unsupported(program: ExportedProgram, deployment_target: str) -> list[Reason]:  # noqa: ARG001 - see the docstring
    """Every reason why a program cannot be converted rightly for a system; empty when there is none.

    Args:
        program: From torch.export, or what `lowerings.decomposed` made of it. Branches and loops are looked into.
        deployment_target: The oldest system that is to run the package: `iOS16`, `iOS17`, `iOS18` or `iOS26`. No operator needs a newer
            one than iOS 16: what MIL had no operation for then is written out by coremltools, attention before iOS 18 among it. What
            does need one (states, functions, sub-byte weights) is refused where it is asked for.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for what, fix, where in _all(decomposed(program)):
        found.setdefault((what, fix), []).append(where)
    return [Reason(what, where=_places(where), fix=fix) for (what, fix), where in found.items()]


def _places(where: list[str]) -> str:
    names = list(dict.fromkeys(name for name in where if name))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _all(program: ExportedProgram) -> Iterator[tuple[str, str, str]]:
    """(what, fix, where) of everything that is refused."""
    for name, value in {**program.state_dict, **program.constants}.items():
        for what, fix in _bad_constant(value):
            yield what, fix, name
    signature = program.graph_signature
    fixed = frozenset((*signature.inputs_to_parameters, *signature.inputs_to_buffers, *signature.inputs_to_lifted_tensor_constants))
    for module in _graphs(program.graph_module):
        for node in module.graph.nodes:
            for what, fix in _bad_value(node, fixed):
                yield what, fix, _module(node)
            if node.op == "call_function":
                for what, fix in _bad_call(node):
                    yield what, fix, _module(node)


def _graphs(module: GraphModule) -> Iterator[GraphModule]:
    import torch

    for inner in module.modules():
        if isinstance(inner, torch.fx.GraphModule):
            yield inner


def _module(node: Node) -> str:
    """The path of the PyTorch module that calls; the name of the node at the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("L['self'].").removeprefix("L['self']").lstrip(".") or node.name


# What a value may be.


def _bad_constant(value: Any) -> Iterator[tuple[str, str]]:
    import torch

    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64 or not value.numel() or value.is_meta:
        return
    low, high = value.aminmax()
    if max(-int(low) - 1, int(high)) > LARGEST_INTEGER:
        yield f"integers from {int(low)} to {int(high)}, and Core ML's have 32 bits", "keep them within int32"


def _bad_value(node: Node, fixed: frozenset[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with a value, `fixed` being the names of weights and constants: what is computed of these alone is folded."""
    import torch

    if node.op == "placeholder" and node.name in fixed:
        return
    values = node.meta.get("val")
    for value in values if isinstance(values, list | tuple) else (values,):
        if not isinstance(value, torch.Tensor):
            continue
        if value.dtype.is_complex:
            yield f"{_call(node)} has complex numbers ({_kind(value)}), which Core ML lacks", "compute with real and imaginary parts"
        if value.dtype == torch.float64 and _computes_wide(node, fixed):
            yield f"{_call(node)} computes in float64, which Core ML lacks", "compute in float32, or beforehand, in a buffer"
        if value.dim() > HIGHEST_RANK and not _is_passing(node):
            fix = "merge axes that stay together"
            yield f"{_call(node)} has {value.dim()} axes {tuple(value.shape)}, and Core ML's tensors at most {HIGHEST_RANK}", fix


def _kind(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _call(node: Node) -> str:
    return f"the input {node.name}" if node.op == "placeholder" else str(node.target)


def _computes_wide(node: Node, fixed: frozenset[str]) -> bool:
    """Whether numbers that depend on an input are computed in float64; casts are harmless."""
    if node.op != "call_function" or kind_of(node.target) in {"_to_copy", "to.dtype", "getitem"} | _COPIES | _RESHAPES | _MOVES:
        return False
    waiting, seen = [node], set()
    while waiting:
        at = waiting.pop()
        if at.op == "placeholder" and at.name not in fixed:
            return True
        waiting += [before for before in at.all_input_nodes if before not in seen]
        seen.update(at.all_input_nodes)
    return False


def _is_passing(node: Node) -> bool:
    """Whether a tensor of many axes lies between two of few, with nothing but a permutation in between.

    coremltools writes that in tensors of four axes (`expand_high_rank_reshape_and_transpose`): a view, a permutation, a view.
    """
    if node.op != "call_function" or len(node.users) != 1 or not all(isinstance(size, int) for size in node.meta["val"].shape):
        return False
    kind = kind_of(node.target)
    if kind not in _RESHAPES | _MOVES | _COPIES:
        return False
    (user,) = node.users
    next_kind = kind_of(user.target) if user.op == "call_function" else ""
    if kind in _RESHAPES:
        return next_kind in _MOVES and node.args[0].meta["val"].dim() <= HIGHEST_RANK  # type: ignore[union-attr]  # fx's arguments are a union
    ends = next_kind in _RESHAPES and user.meta["val"].dim() <= HIGHEST_RANK
    return ends or (next_kind in _COPIES and _is_passing(user))


# What a call may be.


def _bad_call(node: Node) -> Iterator[tuple[str, str]]:
    import torch

    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        if not is_control_flow(node):
            yield f"the operator {target.__name__} has no lowering to Core ML", ""
        return
    name = str(target) if hasattr(target, "_schema") else getattr(target, "__name__", str(target))
    if name.startswith(f"{DOMAIN}."):
        yield from _bad_own(name.split(".")[1])
        return
    kind = kind_of(target)
    if kind in _RANDOM:
        yield f"{name} draws random numbers, which no check could repeat", "make them an input of the model"
        return
    if kind not in known_kinds() and kind not in lowered_kinds():
        yield f"the operator {name} has no lowering to Core ML", "write it in other operators"
        return
    for keyword, value in node.kwargs.items():
        if keyword in DROPPED.get(kind, ()) and kind not in lowered_kinds() and not _changes_nothing(node, keyword, value):
            yield f"{name} with {keyword}={_shown(value)}: coremltools drops {keyword}", f"write it without {keyword}"
    for check in _CHECKS.get(kind, ()):
        yield from check(node)


def _bad_own(name: str) -> Iterator[tuple[str, str]]:
    if name not in OPS or not OPS[name].has("coreml"):
        why = OPS[name].lacks.get("coreml", "") if name in OPS else ""
        yield f"the operator {DOMAIN}::{name} has no lowering to Core ML" + (f": {why}" if why else ""), ""


def _changes_nothing(node: Node, keyword: str, value: Any) -> bool:
    """Whether the keyword has its default, or the dtype that the result has without it."""
    import torch

    if value is None:
        return True
    schema = {argument.name: argument for argument in node.target._schema.arguments}  # type: ignore[union-attr]  # fx's arguments are a union
    if keyword != "dtype":
        return bool(schema[keyword].has_default_value() and value == schema[keyword].default_value)
    first = node.args[0] if node.args else None
    tensor = first.meta.get("val") if hasattr(first, "meta") else None  # type: ignore[union-attr]  # fx's arguments are a union
    if isinstance(tensor, torch.Tensor):
        return bool(tensor.dtype == value)
    numbers = [argument for argument in node.args if isinstance(argument, int | float)]
    floating = any(isinstance(n, float) for n in numbers) or not kind_of(node.target).startswith("arange")
    return bool(value == (torch.float32 if floating else torch.int64))


def _shown(value: Any) -> str:
    return str(value).removeprefix("torch.")


Check = Callable[["Node"], Iterator[tuple[str, str]]]


def _argument(node: Node, name: str) -> Any:
    """An argument by its name in the schema, its default where it is left out."""
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]  # fx's arguments are a union
        if argument.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[i] if i < len(node.args) and not argument.kwarg_only else argument.default_value
    return None


def _dropout(node: Node) -> Iterator[tuple[str, str]]:
    probability = _argument(node, "dropout_p")
    if probability:
        yield f"{node.target} with dropout_p={probability} draws random numbers", "export the model in eval mode"


def _sampled(node: Node) -> Iterator[tuple[str, str]]:
    mode = _argument(node, "interpolation_mode")
    if mode == 2:
        yield f"{node.target} with interpolation_mode=2 (bicubic) has no operation in MIL", "mode='bilinear'"


def _indices(node: Node) -> Iterator[tuple[str, str]]:
    if any(user.target.__name__ == "getitem" and user.args[1] == 1 for user in node.users):  # type: ignore[union-attr]  # fx's arguments are a union
        yield f"{node.target} with its indices (return_indices=True): coremltools has the values alone", "write the pooling without them"


def _training(node: Node) -> Iterator[tuple[str, str]]:
    for keyword in ("train", "training"):
        if _argument(node, keyword):
            yield f"{node.target} with {keyword}=True draws random numbers", "export the model in eval mode"


def _resized(node: Node) -> Iterator[tuple[str, str]]:
    values = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]  # fx's arguments are a union
    if not all(isinstance(size, int) for value in values for size in value.shape[2:]):
        yield f"{node.target} of an image whose size varies, or to one that does", "fix the size"


def _loss(node: Node) -> Iterator[tuple[str, str]]:
    yield f"{node.target} is a loss, which coremltools has for training alone", "export the model without it"


def _inverted(node: Node) -> Iterator[tuple[str, str]]:
    yield f"{node.target} has no operation in MIL", "invert beforehand, in a buffer"


_CHECKS: dict[str, tuple[Check, ...]] = {
    "scaled_dot_product_attention": (_dropout,),
    "grid_sampler": (_sampled,),
    "max_pool2d_with_indices": (_indices,),
    "max_pool1d_with_indices": (_indices,),
    "max_pool3d_with_indices": (_indices,),
    "adaptive_max_pool2d": (_indices,),
    "linalg_inv": (_inverted,),
    "nll_loss_nd": (_loss,),
    **dict.fromkeys(("dropout", "feature_dropout", "native_dropout", "rrelu"), (_training,)),
    **{
        f"{name}{overload}": (_resized,)
        for name in (
            *(f"{prefix}{n}d" for prefix in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)),
            *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
            *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
        )
        for overload in ("", ".vec")
    },
}
"""What depends on an argument, by kind."""
