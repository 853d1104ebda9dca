"""Runs a plan on the CPU, through Triton's interpreter: what stands for a GPU in tests.

Triton decides when a function is decorated whether it is to be compiled or interpreted (TRITON_INTERPRET), and its own library of functions
(`tl.sum`, `tl.zeros`) is decorated when triton is imported, which torch may have done before. Here the same kernels are compiled and
interpreted in one process: for the time of a call, kernels and library functions are replaced by rewritten copies, in a namespace of their
own. Triton 3.7; drop this when triton offers it (the switch is `knobs.runtime.interpret`, read in `triton.jit`).
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import triton.experimental.gluon  # noqa: F401 - triton imports it at the first call, and it checks then that the library is compiled
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from ...op import Arrays, CustomOp
from . import plan as plans
from .interpreter_fixes import fixed

_KERNELS = (JITFunction, interpreter.InterpretedFunction)


def run(op: CustomOp, inputs: Arrays, attributes: Mapping[str, Any], plan: plans.Plan | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Computes an operator through its GPU kernels.

    Args:
        op: The operator.
        inputs: In their dtypes: activations all of one, wide ones float32; optional ones may be absent.
        attributes: Every attribute.
        plan: Instead of the one that fits and is preferred.

    Returns:
        The outputs, in their dtypes.

    Raises:
        UsageError: The inputs do not fit, or no kernel takes their sizes.
    """
    given = {name: x for name, x in inputs.items() if x is not None}
    sizes = op.infer({name: x.shape for name, x in given.items()}, attributes)
    form = op.form(frozenset(given), attributes)
    dtype = given[op.inputs[0].name].dtype.name
    if plan is None:
        plan = plans.choose(op.part("gpu").plans(), form.op_type, dtype, sizes, {name: x.dtype.name for name, x in given.items()})
    known = plans.values(op, plan, sizes, attributes)
    types, shapes = plans.dtypes(op, plan), plans.shapes(op, plan, known)
    tensors = {name: _tensor(x, types[name]) for name, x in given.items()}
    # Absent inputs are zeros, as in the node. What a kernel must write is NaN before, so that a gap shows.
    for name in form.inputs:
        tensors.setdefault(name, torch.zeros(shapes[name], dtype=_torch(types[name])))
    for name in [a.name for a in op.outputs] + [w.name for w in plan.workspace]:
        tensors[name] = torch.full(shapes[name], float("nan"), dtype=torch.float32).to(_torch(types[name]))
    for launch in plan.launches:
        if (grid := plans.grid(launch, known)) is not None:
            arguments = [_argument(launch, p, tensors, attributes, known) for p in plans.parameters(op, plan, launch)]
            execute(launch, grid, arguments)
    return {a.name: _array(tensors[a.name]) for a in op.outputs}


def _argument(
    launch: plans.Launch,
    parameter: plans.Parameter,
    tensors: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    known: Mapping[str, int],
) -> torch.Tensor | int | float:
    match parameter.kind:
        case "pointer":
            return tensors[parameter.text]
        case "float":
            return float(attributes[parameter.text])
        case "int":
            return plans.integer(launch, parameter, known)


def execute(launch: plans.Launch, grid: tuple[int, int, int], arguments: Sequence[torch.Tensor | int | float]) -> None:
    """Runs one kernel, program after program, on tensors in the CPU's memory.

    Args:
        launch: The kernel and its constants.
        grid: Number of programs on each axis.
        arguments: The run-time arguments in order. Integers must fit 32 bits.
    """
    kernel, names = _rewritten(launch.kernel.fn), list(launch.arguments)
    bound = dict(zip(names, arguments, strict=True)) | dict(launch.constants)
    # NaN and infinity are values here; the caller judges them.
    with fixed(), _library(), np.errstate(all="ignore"):
        executor = interpreter.GridExecutor(kernel, list(launch.kernel.arg_names), grid)
        executor(**bound)


@functools.cache
def _rewritten(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as the interpreter needs it. Its globals are a copy, in which the kernels that it calls are rewritten too."""
    namespace = dict(function.__globals__)
    copy = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    copy.__annotations__ = dict(function.__annotations__)
    copy.__module__ = function.__module__
    for name in _called(function.__code__):
        if isinstance(namespace.get(name), _KERNELS):
            namespace[name] = _rewritten(namespace[name].fn)
    # Triton patches the modules that it finds among the globals, and its library needs both.
    namespace |= {"tl": tl, "core": tl.core}
    return interpreter.FunctionRewriter(copy).rewrite_ast()  # type: ignore[no-any-return]  # untyped


def _called(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _called(constant)


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """Replaces the library's compiled functions, in the places where kernels find them."""
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for place in (tl, tl.standard, tl.math, tl.core.tensor):
            for name, value in vars(place).copy().items():
                if isinstance(value, _KERNELS):
                    replaced.append((place, name, value))
                    setattr(place, name, _rewritten(value.fn))
        yield
    finally:
        for place, name, value in replaced:
            setattr(place, name, value)


def _torch(dtype: str) -> torch.dtype:
    return getattr(torch, dtype)  # type: ignore[no-any-return]  # untyped


def _tensor(x: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    if x.dtype.name != dtype:
        raise TypeError(f"got {x.dtype.name}, expected {dtype}")
    if dtype in ("bfloat16", "float8_e4m3fn"):  # ml_dtypes, which torch does not know
        bits = np.ascontiguousarray(x).view(np.uint8 if x.dtype.itemsize == 1 else np.int16)
        return torch.from_numpy(bits.copy()).view(_torch(dtype))
    return torch.from_numpy(np.array(x, order="C"))


def _array(x: torch.Tensor) -> np.ndarray[Any, Any]:
    if x.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        import ml_dtypes

        name = str(x.dtype).removeprefix("torch.")
        return x.view(torch.int16 if x.dtype.itemsize == 2 else torch.uint8).numpy().view(getattr(ml_dtypes, name))
    return x.numpy()
