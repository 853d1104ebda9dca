"""TensorRT 11's quick plugins: one kernel, as PTX, that goes into the engine, so that no library of ours is needed where it runs.

TensorRT passes such a kernel the inputs, then 32-bit integers, then the outputs; no floats, no workspace, one launch. So an operator's
`tensorrt_quick.py` has plans of one launch each, which may be those of the GPU part, the attributes are compiled in, and the parameters are
put into that order in the PTX, whose code knows them by name.

What TensorRT is told is computed by plain functions (`choose`, `Quick`, `arrange`), which the tests execute through Triton's interpreter.
`register` hands it over, with TensorRT's decorators: not run here, because that needs the TensorRT libraries and a GPU.

Source: `tensorrt/plugin/` of the package tensorrt-cu13-bindings 11.4.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import IsthmusError, Reason, UsageError
from ...op import CustomOp
from ...op import evaluate as evaluate_size
from ..gpu import plan as plans
from ..gpu.compile import compile_launch
from ..gpu.expressions import FUNCTIONS, evaluate, names

NOT_RUN = "TensorRT's quick plugins need the TensorRT 11 libraries and a GPU"
"""Why `register` is not executed where it is tested."""

_TYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}


class Symbol:
    """A number or one of TensorRT's symbolic integers, with every operator that expressions of launches use.

    TensorRT's own have `+ - * // ==` and `<`, with a symbolic integer on the left.

    Attributes:
        value: The int or symbolic integer.
    """

    def __init__(self, value: Any, api: Any) -> None:
        self.value, self._api = value, api

    def _both(self, other: Any) -> tuple[Any, Any]:
        other = other.value if isinstance(other, Symbol) else other
        first = self._api.SymInt32(self.value) if isinstance(self.value, int) and not isinstance(other, int) else self.value
        return first, other

    def _made(self, value: Any) -> Symbol:
        return Symbol(value, self._api)

    def __add__(self, other: Any) -> Symbol:
        a, b = self._both(other)
        return self._made(a + b)

    def __sub__(self, other: Any) -> Symbol:
        a, b = self._both(other)
        return self._made(a - b)

    def __mul__(self, other: Any) -> Symbol:
        a, b = self._both(other)
        return self._made(a * b)

    def __floordiv__(self, other: Any) -> Symbol:
        a, b = self._both(other)
        return self._made(a // b)

    def __mod__(self, other: Any) -> Symbol:
        whole: Symbol = (self // other) * other
        return self - whole

    def __lt__(self, other: Any) -> Symbol:
        a, b = self._both(other)
        return self._made(a < b)

    def __radd__(self, other: int) -> Symbol:
        return self._made(other) + self

    def __rsub__(self, other: int) -> Symbol:
        return self._made(other) - self

    def __rmul__(self, other: int) -> Symbol:
        return self._made(other) * self

    def __rfloordiv__(self, other: int) -> Symbol:
        return self._made(other) // self


def _functions(api: Any) -> dict[str, Any]:
    """`cdiv`, `min` and `max` of symbols."""

    def symbol(x: Any) -> Symbol:
        return x if isinstance(x, Symbol) else Symbol(x, api)

    def least(a: Any, b: Any) -> Symbol:
        below = symbol(a) < symbol(b)
        return symbol(a) * below + symbol(b) * (1 - below)

    return {"cdiv": lambda a, b: (symbol(a) + b - 1) // b, "min": least, "max": lambda a, b: symbol(a) + b - least(a, b)}


def sizes(op: CustomOp, op_type: str, shapes: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every name in the shapes, for ints and for symbols; nothing is compared, because symbols cannot be.

    Args:
        op: The operator.
        op_type: The node type.
        shapes: Shape of each input of the node.
        attributes: Every attribute.
    """
    known = {a.name: a for a in op.inputs}
    found: dict[str, Any] = dict(op.sizes(attributes))
    axes = [
        (d, s)
        for n, shape in zip(plans.form_of(op, op_type).inputs, shapes, strict=True)
        for d, s in zip(known[n].shape, shape, strict=True)
    ]
    for dim, size in sorted(axes, key=lambda row: "*" in str(row[0])):
        if isinstance(dim, int) or dim.endswith("-1"):
            continue
        *others, last = sorted(dim.split("*"), key=lambda name: name not in found)
        if last not in found:
            divisor: Any = 1
            for name in others:
                divisor = divisor * found[name]
            found[last] = size // divisor if others else size
    return found


@dataclass(frozen=True)
class Quick:
    """What TensorRT is told about a launch.

    Attributes:
        op: The operator.
        plan: The plan, of one launch.
        baked: The parameters that become constants: the attributes.
        grid: Number of programs on each axis: ints or symbols.
        extra: The integers between the inputs and the outputs.
        takes: For each parameter of the kernel that is left, which of the arguments that TensorRT passes it is.
        count: How many arguments TensorRT passes.
    """

    op: CustomOp
    plan: plans.Plan
    baked: Mapping[str, int | float | bool]
    grid: tuple[Any, Any, Any]
    extra: tuple[Any, ...]
    takes: tuple[int, ...]
    count: int

    @property
    def launch(self) -> plans.Launch:
        """The launch."""
        return self.plan.launches[0]

    def code(self, architecture: str) -> tuple[str, str, int]:
        """Compiles the kernel.

        Args:
            architecture: Key of `gpu.compile.ARCHITECTURES`.

        Returns:
            The kernel's name, its PTX, and the shared memory that it needs in bytes.
        """
        compiled = compile_launch(self.op, self.plan, self.launch, architecture, self.baked)
        return compiled.facts.name, arrange(compiled.ptx, self.takes, self.count), compiled.facts.shared

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.launch.warps


def choose(
    op: CustomOp,
    every: Iterable[plans.Plan],
    op_type: str,
    dtype: str,
    shapes: Sequence[Sequence[Any]],
    attributes: Mapping[str, Any],
    api: Any = None,
) -> Quick:
    """The first plan that fits, with its launch computed.

    Args:
        op: The operator.
        every: The plans of its `tensorrt_quick.py`.
        op_type: The node type.
        dtype: Of the activations.
        shapes: Shape of each input of the node: ints, or TensorRT's symbolic integers.
        attributes: Every attribute.
        api: `tensorrt.plugin`, where there are symbolic integers.

    Raises:
        UsageError: No plan fits. A size in a plan's condition must be known when the engine is built.
    """
    wrapped = [[s if isinstance(s, int) else Symbol(s, api) for s in shape] for shape in shapes]
    known = sizes(op, op_type, wrapped, attributes)
    reasons = []
    for plan in every:
        if (plan.form, plan.dtype) != (op_type, dtype):
            continue
        unknown = [n for n in sorted(names(plan.fits)) if not isinstance(known[n], int)]
        if unknown:
            reasons.append(Reason(f"needs {plan.fits}, and {', '.join(unknown)} is not fixed", where=f"kernel {plan.name}"))
        elif not evaluate(plan.fits, known):
            reasons.append(Reason(f"needs {plan.fits}", where=f"kernel {plan.name}"))
        else:
            return _computed(op, plan, known, attributes, api)
    raise UsageError(f"no quick plugin of {op_type} takes these inputs", reasons=reasons or [Reason(f"no kernel takes {dtype}")])


def _computed(op: CustomOp, plan: plans.Plan, known: Mapping[str, Any], attributes: Mapping[str, Any], api: Any) -> Quick:
    if len(plan.launches) != 1 or plan.workspace:
        raise IsthmusError(
            f"the quick plan {plan.name} has {len(plan.launches)} launches and {len(plan.workspace)} workspaces; expected 1 and 0"
        )
    (launch,) = plan.launches
    inputs, outputs = plans.arguments_of(op, plan)
    run_time = plans.parameters(op, plan, launch)
    baked = {p.name: _baked(attributes[p.text]) for p in run_time if p.text in attributes}
    kept = [p for p in run_time if p.name not in baked]
    texts = list(dict.fromkeys(p.text for p in kept if p.kind == "int"))
    passed = [*(a.name for a in inputs), *texts, *(a.name for a in outputs)]
    functions = FUNCTIONS if api is None else _functions(api)
    known = plans.values(op, plan, known, attributes, functions)

    def computed(text: str) -> Any:
        value = evaluate(text, known, functions)
        return value.value if isinstance(value, Symbol) else int(value)

    grid = (computed(launch.grid[0]), computed(launch.grid[1]), computed(launch.grid[2]))
    return Quick(op, plan, baked, grid, tuple(map(computed, texts)), tuple(passed.index(p.text) for p in kept), len(passed))


def _baked(value: Any) -> int | float:
    return int(value) if isinstance(value, (bool, int)) else float(value)


def arrange(ptx: str, takes: Sequence[int], count: int) -> str:
    """The PTX with the parameters that TensorRT passes, in its order.

    The code knows parameters by their names, so that their declarations can be moved. One that is passed twice becomes one; an input that
    the kernel does not read is declared; the two that Triton appends for scratch memory go.

    Args:
        ptx: A kernel as Triton compiles it.
        takes: For each parameter, which argument it is.
        count: How many arguments there are.

    Raises:
        IsthmusError: The PTX is not as expected, or its code uses scratch memory.
    """
    head, entry, rest = ptx.partition(".entry")
    opening, bracket, rest = rest.partition("(")
    declared, closing, body = rest.partition(")")
    lines = [line.strip() for line in declared.split(",")]
    declarations = [found[0] if len(found := re.findall(r"\w+_param_\d+$", line)) == 1 else "" for line in lines]
    if not bracket or not closing or len(lines) != len(takes) + 2 or not all(declarations):
        raise IsthmusError(f"the kernel's PTX declares {declarations}; expected {len(takes)} parameters and two for scratch memory")
    if used := [name for name in declarations[len(takes) :] if re.search(rf"\b{name}\b", body)]:
        raise IsthmusError(f"the kernel uses scratch memory: {', '.join(used)}")
    kept: dict[int, int] = {}
    for i, argument in enumerate(takes):
        if argument in kept:
            body = re.sub(rf"\b{declarations[i]}\b", declarations[kept[argument]], body)
        else:
            kept[argument] = i
    ordered = [lines[kept[i]] if i in kept else f".param .u64 unread_param_{i}" for i in range(count)]
    return head + entry + opening + bracket + "\n\t" + ",\n\t".join(ordered) + "\n" + closing + body


def register(op: CustomOp, every: Sequence[plans.Plan], architecture: str, api: Any = None) -> None:
    """Registers the operator's node types as quick plugins `isthmus::NODE_TYPE` with TensorRT in this process. Not run here: see `NOT_RUN`.

    In the ONNX graph the nodes carry `plugin_namespace="isthmus"` and `aot=1`.

    Args:
        op: The operator.
        every: The plans of its `tensorrt_quick.py`.
        architecture: Key of `gpu.compile.ARCHITECTURES`: of the GPU for which the engine is built.
        api: `tensorrt.plugin`; imported by default.
    """
    if api is None:
        import tensorrt.plugin

        api = tensorrt.plugin
    for form in op.forms:
        if any(plan.form == form.op_type for plan in every):
            _register(op, every, form.op_type, architecture, api)


def _register(op: CustomOp, every: Sequence[plans.Plan], op_type: str, architecture: str, api: Any) -> None:
    form = plans.form_of(op, op_type)
    known = {a.name: a for a in op.inputs}
    carried = [a for a in op.attributes if a.name not in form.fixed]
    dtypes = list(dict.fromkeys(plan.dtype for plan in every if plan.form == op_type))
    count = len(form.inputs)

    def attributes_of(values: Sequence[Any]) -> dict[str, Any]:
        return {**form.fixed, **{a.name: v for a, v in zip(carried, values, strict=True)}}

    def describe(*given: Any) -> Any:
        inputs, attributes = given[:count], attributes_of(given[count:])
        shapes = [[Symbol(s, api) for s in desc.shape_expr] for desc in inputs]
        found = sizes(op, op_type, shapes, attributes)
        results = []
        for argument in op.outputs:
            shape = [evaluate_size(dim, found) for dim in argument.shape]
            plain = tuple(s.value if isinstance(s, Symbol) else s for s in shape)
            # A state has the type of the state that goes in: float32 where the schema says so.
            like = next((d for n, d in zip(form.inputs, inputs, strict=True) if argument.wide and known[n].wide), inputs[0])
            results.append(api.from_shape_expr(plain, like.dtype))
        return tuple(results)

    def autotune(*given: Any) -> list[Any]:
        every_argument = [*(known[n] for n in form.inputs), *op.outputs]
        types = ", ".join("|".join("FP32" if a.wide else _TYPES[d] for d in dtypes) for a in every_argument)
        return [api.AutoTuneCombination(types, "LINEAR")]

    def implement(*given: Any) -> tuple[str, str, Any, Any]:
        inputs, attributes = given[:count], attributes_of(given[count:-2])
        dtype = {"HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32"}[inputs[0].dtype.name]
        shapes = [[s.constant_value() if s.is_constant else s for s in desc.shape_expr] for desc in inputs]
        quick = choose(op, every, op_type, dtype, shapes, attributes, api)
        name, ptx, shared = quick.code(architecture)
        launch = api.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = quick.grid
        launch.block_x, launch.shared_mem = quick.threads, shared
        extra = api.SymIntExprs(len(quick.extra))
        for i, value in enumerate(quick.extra):
            extra[i] = api.SymInt32(value)
        return name, ptx, launch, extra

    # TensorRT reads names and types of the arguments from the signatures.
    tensors = [(n, api.TensorDesc) for n in form.inputs]
    settings = [(a.name, int if a.type is bool else a.type) for a in carried]
    outputs = ("outputs", tuple[(api.TensorDesc,) * len(op.outputs)])  # type: ignore[misc]  # as many as there are
    returned = tuple[str, str, api.KernelLaunchParams, api.SymIntExprs]
    plugin = f"isthmus::{op_type}"
    api.register(plugin)(_signed(describe, op_type, [*tensors, *settings], outputs[1]))
    api.autotune(plugin)(_signed(autotune, op_type, [*tensors, *settings, outputs], list[api.AutoTuneCombination]))
    api.aot_impl(plugin)(_signed(implement, op_type, [*tensors, *settings, outputs, ("tactic", int)], returned))


def _signed(function: Any, name: str, parameters: Sequence[tuple[str, Any]], returned: Any) -> Any:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__name__ = name
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(n, kind, annotation=t) for n, t in parameters], return_annotation=returned
    )
    return function


def one_launch(every: Iterable[plans.Plan]) -> tuple[plans.Plan, ...]:
    """Those plans of a GPU part that a quick plugin can have: one launch, no memory beside it, activations of one dtype."""
    return tuple(plan for plan in every if len(plan.launches) == 1 and not plan.workspace and not plan.types)


def interpreted(quick: Quick) -> plans.Launch:
    """The launch as the interpreter executes it: the attributes are constants."""
    constants: dict[str, Any] = {**quick.launch.constants, **quick.baked}
    return replace(quick.launch, constants=constants)
