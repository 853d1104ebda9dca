"""PyTorch in the target dtype, on a machine whose PyTorch computes in float32.

torch 2.13 has no fast float16 convolution on CPUs without float16 instructions, so the rounding is emulated: values are rounded to the
dtype and back where PyTorch's autocast would hold them in it, products accumulate in float32 as tensor cores do. What this stage shows is
the error that the dtype alone costs, before any lowering.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from ..exporter.decisions import exact_calls
from ..exporter.op import DOMAIN, OPS, CustomOp

# torch.autocast's lists (torch 2.13, aten/src/ATen/autocast_mode.h): what runs in the lower precision, and what is kept in float32.
_LOWER = (
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "scaled_dot_product_attention",
    "einsum",
)
_FLOAT32 = (
    "layer_norm native_layer_norm rms_norm group_norm native_group_norm instance_norm batch_norm softmax log_softmax _softmax exp exp2 "
    "expm1 log log2 log10 log1p pow rsqrt sqrt reciprocal sum mean prod norm linalg_vector_norm cumsum cumprod var std sin cos tan "
    "softplus logsumexp div"
).split()


def module_peaks(program: torch.export.ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, dict[str, float]]:
    """Runs the program in float32 and records the largest |value| that each module computes itself.

    Args:
        program: The traced program.
        inputs: Its inputs, in order.

    Returns:
        The program's outputs, and module path to peak; the path of the outermost module is the empty string.
    """
    interpreter = _Peaks(program.module())
    with torch.no_grad():
        return interpreter.run(*inputs), interpreter.peaks


def run_rounded(
    program: torch.export.ExportedProgram,
    inputs: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    keep_modules: Collection[str] = (),
    watch: Callable[[str, Any], None] | None = None,
) -> Any:
    """Runs the program with values rounded to `dtype` as `torch.autocast` would hold them.

    Args:
        program: The traced program, in float32.
        inputs: Its inputs, in order, not rounded.
        dtype: `torch.float16` or `torch.bfloat16`.
        keep_modules: Module paths that stay in float32.
        watch: Sees the name of every node of `program.module()` and what it computes. Not to change it.

    Returns:
        The program's outputs, in float32.
    """
    with torch.no_grad():
        return _Rounded(program.module(), dtype, frozenset(keep_modules), watch).run(*inputs)


def module_path(node: fx.Node) -> str:
    """The path of the PyTorch module whose `forward` made this node, `""` for the outermost."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("L['self'].").removeprefix("L['self']").lstrip(".")


class _Peaks(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.peaks: dict[str, float] = {}
        self._of: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        values = result if isinstance(result, tuple | list) else (result,)
        if n.op in ("placeholder", "call_function"):
            self._of[n] = max((_peak(value) for value in values), default=0.0)
        if n.op == "call_function":
            # What a module reads has to fit as well as what it computes: a graph's input, or another module's result, is cast for it.
            path = module_path(n)
            read = [self._of.get(a, 0.0) for a in n.all_input_nodes]
            self.peaks[path] = max(self.peaks.get(path, 0.0), self._of[n], *read)
        return result


def _peak(value: object) -> float:
    if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()):
        return 0.0
    # A mask's infinity is no activation.
    return float(torch.nan_to_num(value.detach(), nan=0.0, posinf=0.0, neginf=0.0).abs().max())


class _Rounded(fx.Interpreter):
    def __init__(
        self, module: fx.GraphModule, dtype: torch.dtype, keep: frozenset[str], watch: Callable[[str, Any], None] | None = None
    ) -> None:
        super().__init__(module)
        self._dtype = dtype
        self._keep = keep
        self._watch = watch
        self._exact = exact_calls(module.graph)
        self._low: set[fx.Node] = set()  # nodes whose value is held in the dtype

    def run_node(self, n: fx.Node) -> Any:
        result = self._computed(n)
        if self._watch is not None:
            self._watch(n.name, result)
        return result

    def _computed(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "get_attr" and _is_float(result):
            self._low.add(n)  # weights are stored in the dtype; see fetch_args_kwargs_from_env
        if n.op != "call_function" or module_path(n) in self._keep or n in self._exact:
            return result
        if (op := _custom(n)) is not None:
            return self._round_custom(n, op, result)
        if not _is_float(result):
            return result
        name = _operator(n.target)
        if name == "getitem" and isinstance(source := n.args[0], fx.Node) and (op := _custom(source)) is not None:
            if not op.outputs[int(n.args[1])].wide:  # type: ignore[arg-type]  # getitem's is a number
                self._low.add(n)
            return result
        floats = [a for a in n.all_input_nodes if _is_float(a.meta.get("val"))]
        if name in _FLOAT32 or isinstance(n.target, torch._ops.HigherOrderOperator):
            return result
        # An epsilon that the dtype cannot hold is added in float32, by autocast's users as by our lowering: rounded away, 0 / 0 is NaN.
        if any(isinstance(a, float) and 0 < abs(a) < torch.finfo(self._dtype).smallest_normal for a in n.args):
            return result
        if name in _LOWER or (floats and all(a in self._low for a in floats)):
            self._low.add(n)
            return self._round(result)
        return result

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """Rounds what products read, and weights where they are used: rounded where they are fetched, all would be held at once.

        Operators of ours take their activations in the dtype and their parameters and states in float32.
        """
        kept = module_path(n) in self._keep or n in self._exact
        lower = n.op == "call_function" and _operator(n.target) in _LOWER

        def fetch(node: fx.Node) -> Any:
            value = self.env[node]
            return self._round(value) if not kept and (lower or node.op == "get_attr") and _is_float(value) else value

        op = _custom(n)
        if op is None:
            return fx.map_arg(n.args, fetch), fx.map_arg(n.kwargs, fetch)

        def fetch_exact(node: fx.Node) -> Any:
            return self.env[node]

        def fetch_rounded(node: fx.Node) -> Any:
            value = self.env[node]
            return value if kept or not _is_float(value) else self._round(value)

        fetches = {a.name: fetch_exact if a.wide else fetch_rounded for a in op.inputs}
        args = tuple(fx.map_arg(arg, fetches[a.name]) for arg, a in zip(n.args, op.inputs, strict=False))
        return args, {name: fx.map_arg(arg, fetches.get(name, fetch_exact)) for name, arg in n.kwargs.items()}

    def _round_custom(self, n: fx.Node, op: CustomOp, result: Any) -> Any:
        """The results of an operator of ours, its activations rounded; inside, it sums in float32 and keeps its state in it."""
        if isinstance(result, torch.Tensor):
            self._low.add(n)
            return self._round(result)
        return tuple(x if a.wide else self._round(x) for a, x in zip(op.outputs, result, strict=True))

    def _round(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._dtype).to(value.dtype)


def _custom(n: fx.Node) -> CustomOp | None:
    """The operator of ours that the node calls."""
    target = n.target
    if n.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != DOMAIN:
        return None
    return OPS[str(target._schema.name).split("::")[1]]


def _operator(target: object) -> str:
    return str(getattr(target, "__name__", target)).split(".")[0]


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
