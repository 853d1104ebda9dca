"""How an operator runs on a GPU, as data: which kernels, with which grids, arguments and workspace.

Sizes are expressions (see `expressions`) over the names of the operator's schema, so that Python, C++ and TensorRT evaluate the same text.
A `gpu.py` exports `plans()`, everything that is compiled ahead of time, and `TENSOR_CORES`, whether its kernels are to use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import IsthmusError, Reason, UsageError
from ...op import Argument, CustomOp, Form
from ...op import evaluate as evaluate_size
from .expressions import FUNCTIONS, evaluate, names

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "fp8e4nv", "int32": "i32"}
"""Dtypes of tensors, and what Triton calls them."""

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int32": 4}
"""Bytes of an element."""

ALIGNMENT = 16
"""Every pointer that a kernel is given is a multiple of this many bytes; kernels are compiled for it."""

LIMIT = 2**31 - 1
"""The largest integer argument, and the largest x of a grid."""

GRID_LIMIT = 65535
"""The largest y and z of a grid."""


@dataclass(frozen=True)
class Workspace:
    """Memory that lives from the first launch of a plan to the last. Its contents are undefined at first.

    Attributes:
        name: Its name among the arguments.
        dtype: Of its elements.
        shape: Expressions.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel of a plan.

    Attributes:
        kernel: The function decorated with `triton.jit`.
        grid: Number of programs on each axis: expressions.
        constants: The value of every `tl.constexpr` parameter.
        rename: What stands for a parameter whose name is not that of the thing itself: the name of an input, output, workspace or
            attribute, or an expression. Every other parameter is the input, output, workspace, size or attribute of its name.
        warps: Warps of a program: blocks have 32 times as many threads.
        stages: Depth of the software pipeline.
        when: A condition; the kernel is launched when it holds.
        divisible: Integer parameters that are multiples of `multiple` wherever the plan fits, so that rows are aligned.
        multiple: A power of two. Loads are up to 16 bytes wide where as many elements are.
    """

    kernel: Any
    grid: tuple[str, str, str]
    constants: Mapping[str, int | bool | str]
    rename: Mapping[str, str] = field(default_factory=dict)
    warps: int = 4
    stages: int = 1
    when: str = "1"
    divisible: frozenset[str] = frozenset()
    multiple: int = 16

    @property
    def name(self) -> str:
        """The kernel's name, that of its entry in PTX and cubin."""
        return str(self.kernel.fn.__name__)

    @property
    def arguments(self) -> dict[str, str]:
        """What is passed for each run-time parameter, in order."""
        code = self.kernel.fn.__code__
        parameters: tuple[str, ...] = code.co_varnames[: code.co_argcount]
        return {p: self.rename.get(p, p) for p in parameters if p not in self.constants}


@dataclass(frozen=True)
class Plan:
    """The launches of an operator for one ONNX node type, one dtype of the activations and some range of sizes.

    Attributes:
        name: What tells it from the other plans of its form and dtype.
        form: The node type.
        dtype: Of the activations.
        launches: In order, on one stream.
        sizes: Further names, in order: expressions over the schema's sizes, attributes that are integers, and the names before.
        workspace: Memory between the launches.
        fits: A condition over the sizes: the plan computes the right values.
        prefer: A condition over the sizes: it is faster than the plans after it.
        types: Dtypes of inputs and outputs that are not as the schema says.
    """

    name: str
    form: str
    dtype: str
    launches: tuple[Launch, ...]
    sizes: Mapping[str, str] = field(default_factory=dict)
    workspace: tuple[Workspace, ...] = ()
    fits: str = "1"
    prefer: str = "1"
    types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Parameter:
    """A run-time parameter of a kernel.

    Attributes:
        name: In the kernel.
        kind: A tensor's address, or a 32-bit number.
        text: The name of the tensor or of the float attribute; for an integer, its expression.
        dtype: Of the tensor's elements; "int32" or "float32" otherwise.
    """

    name: str
    kind: Literal["pointer", "int", "float"]
    text: str
    dtype: str

    def signature(self) -> str:
        """Its type in Triton's signatures."""
        return f"{'*' if self.kind == 'pointer' else ''}{DTYPES[self.dtype]}"


def parameters(op: CustomOp, plan: Plan, launch: Launch) -> tuple[Parameter, ...]:
    """What a launch passes, in order.

    After these, every kernel that Triton compiled takes two more addresses, which may be null: scratch memory, of which ours use none.
    """
    tensors = dtypes(op, plan)
    floats = {a.name for a in op.attributes if a.type is float}
    result = []
    for name, text in launch.arguments.items():
        if text in tensors:
            result.append(Parameter(name, "pointer", text, tensors[text]))
        elif text in floats:
            result.append(Parameter(name, "float", text, "float32"))
        else:
            result.append(Parameter(name, "int", text, "int32"))
    return tuple(result)


def form_of(op: CustomOp, op_type: str) -> Form:
    """The form of a node type."""
    return next(form for form in op.forms if form.op_type == op_type)


def arguments_of(op: CustomOp, plan: Plan) -> tuple[tuple[Argument, ...], tuple[Argument, ...]]:
    """The inputs, in the order of the node, and the outputs."""
    known = {a.name: a for a in op.inputs}
    return tuple(known[name] for name in form_of(op, plan.form).inputs), op.outputs


def dtypes(op: CustomOp, plan: Plan) -> dict[str, str]:
    """The dtype of every input, output and workspace of a plan."""
    inputs, outputs = arguments_of(op, plan)
    result = {a.name: plan.types.get(a.name, "float32" if a.wide else plan.dtype) for a in (*inputs, *outputs)}
    return result | {w.name: w.dtype for w in plan.workspace}


def values(
    op: CustomOp,
    plan: Plan,
    sizes: Mapping[str, Any],
    attributes: Mapping[str, Any],
    functions: Mapping[str, Callable[[Any, Any], Any]] = FUNCTIONS,
) -> dict[str, Any]:
    """The value of every name that a plan's expressions may use: sizes, integer and Boolean attributes, and the plan's own sizes."""
    known = dict(sizes) | {a.name: int(attributes[a.name]) for a in op.attributes if a.type in (bool, int) and a.name in attributes}
    for name, text in plan.sizes.items():
        known[name] = evaluate(text, known, functions)
    return known


def choose(plans: Iterable[Plan], op_type: str, dtype: str, sizes: Mapping[str, int], types: Mapping[str, str] | None = None) -> Plan:
    """The first plan that fits and is preferred.

    Args:
        plans: Those of an operator.
        op_type: The node type.
        dtype: Of the activations.
        sizes: The value of every name in the shapes.
        types: Dtypes of inputs, where plans differ in them.

    Raises:
        UsageError: None fits; the reasons are the conditions that do not hold.
    """
    reasons = []
    takes: set[str] = set()
    for plan in plans:
        if plan.form == op_type:
            takes.add(plan.dtype)
        if (plan.form, plan.dtype) != (op_type, dtype):
            continue
        if wrong := [f"{n} in {t}" for n, t in plan.types.items() if (types or {}).get(n, t) != t]:
            reasons.append(Reason(f"needs {' and '.join(wrong)}", where=f"kernel {plan.name}"))
            continue
        if not evaluate(plan.fits, sizes):
            reasons.append(Reason(f"needs {plan.fits}", where=f"kernel {plan.name}"))
        elif evaluate(plan.prefer, sizes):
            return plan
    if not reasons:
        how = "dequantize" if dtype.startswith("float8") else "cast"
        fix = f"{how} the activations before the node: it takes {', '.join(sorted(takes))}"
        reasons = [Reason(f"no kernel takes {dtype}", where=op_type, fix=fix if takes else "")]
    got = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    raise UsageError(f"no GPU kernel of {op_type} takes these sizes: {got}", reasons=reasons)


def shapes(op: CustomOp, plan: Plan, known: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The shape of every input, output and workspace, for the values that `values` found."""
    inputs, outputs = arguments_of(op, plan)
    result = {a.name: tuple(evaluate_size(dim, known) for dim in a.shape) for a in (*inputs, *outputs)}
    return result | {w.name: tuple(evaluate(dim, known) for dim in w.shape) for w in plan.workspace}


def grid(launch: Launch, known: Mapping[str, int]) -> tuple[int, int, int] | None:
    """The grid of a launch, or None when it is left out.

    Raises:
        UsageError: It, or an integer argument, is past what the hardware or the kernel takes.
    """
    if not evaluate(launch.when, known):
        return None
    x, y, z = (int(evaluate(text, known)) for text in launch.grid)
    if not (0 < x <= LIMIT and 0 < y <= GRID_LIMIT and 0 < z <= GRID_LIMIT):
        raise UsageError(f"the grid ({x}, {y}, {z}) of {launch.name} is outside 1 to ({LIMIT}, {GRID_LIMIT}, {GRID_LIMIT})")
    return x, y, z


def integer(launch: Launch, parameter: Parameter, known: Mapping[str, int]) -> int:
    """The value of an integer argument.

    Raises:
        UsageError: It does not fit 32 bits.
    """
    value = int(evaluate(parameter.text, known))
    if not 0 <= value <= LIMIT:
        raise UsageError(f"{parameter.name} = {value} ({parameter.text}) of {launch.name} is outside 0 to {LIMIT}")
    return value


def check(op: CustomOp, plans: Iterable[Plan]) -> None:
    """Checks what can be known before any size is.

    Raises:
        IsthmusError: A plan names what is not there; every fault is listed.
    """
    reasons: list[Reason] = []
    for plan in plans:
        reasons += [Reason(what, where=f"{op.name}, {plan.form}, {plan.dtype}, {plan.name}") for what in _faults(op, plan)]
    if reasons:
        raise IsthmusError(f"the GPU plans of {op.name} are wrong", reasons=reasons)


def _faults(op: CustomOp, plan: Plan) -> Iterator[str]:
    dims = [dim for a in (*op.inputs, *op.outputs) for dim in a.shape if isinstance(dim, str)]
    known = {factor for dim in dims for factor in dim.removesuffix("-1").split("*")}
    for text in (plan.fits, plan.prefer):
        yield from (f"{name!r} in {text!r} is not a size" for name in names(text) - known)
    known |= {a.name for a in op.attributes if a.type in (bool, int)}
    for size, text in plan.sizes.items():
        yield from (f"{name!r} in {size} = {text!r} is not known" for name in names(text) - known)
        known.add(size)
    for space in plan.workspace:
        yield from (f"{name!r} in the shape of {space.name} is not known" for text in space.shape for name in names(text) - known)
    for launch in plan.launches:
        code = launch.kernel.fn.__code__
        for constant in launch.constants.keys() - set(code.co_varnames[: code.co_argcount]):
            yield f"{launch.name} has no parameter {constant!r}"
        for renamed in (launch.rename.keys() | launch.divisible) - launch.arguments.keys():
            yield f"{launch.name} has no run-time parameter {renamed!r}"
        texts = [*launch.grid, launch.when, *(p.text for p in parameters(op, plan, launch) if p.kind == "int")]
        yield from (f"{name!r} in {text!r} of {launch.name} is not known" for text in texts for name in names(text) - known)
