"""PyTorch operators that coremltools 9.0 lacks, or lowers wrongly: its front end drops keywords without a word.

There are two kinds, each registered by a decorator in one of the files of this folder:

- a *decomposition* writes an operator in terms of others, in torch (`@decomposition`). `decomposed` applies them, before anything is
  converted, in the branches of `cond` and `while_loop` as well;
- a *lowering* emits operations of MIL (`@lowering`), for what MIL has an operation of its own for, or what keeps its digits in float16
  in that form alone. `register` hands them to coremltools in place of its own.

Both are called with the arguments of the torch operator, and give `NotImplemented` for the calls that are right as they are. Operators that
are in neither, and that coremltools does not know, are decomposed by torch's own tables where these have them. Attention, normalisations
and convolutions stay whole. What remains is judged by `support`, which refuses the calls that nobody lowers rightly.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ....exporter.quiet import quiet

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Lowering = Callable[..., Any]
F = TypeVar("F", bound=Lowering)

_MODULES = (
    "activations",
    "arithmetic",
    "attention",
    "convolution",
    "creation",
    "functions",
    "indexing",
    "losses",
    "matrices",
    "normalization",
    "ordering",
    "padding",
    "pooling",
    "reductions",
    "resizing",
    "shapes",
)

WRONG_PASSES = frozenset({"common::add_int16_cast"})
"""Passes of coremltools 9.0 that change results, to be left out of every conversion.

`add_int16_cast` (it runs for float16) makes integers int16 or uint16 that are gathered, squeezed or ordered, and looks at the range of
constants alone: a token 49407 that passes through `squeeze` becomes -16129, and -7 becomes 65529 after an index that is a constant
(`passes/defs/quantization.py`, whose choice between the two types is kept from one operation to the next).
"""

_DONE = "isthmus_coreml_decomposed"
"""Marks a graph: most decompositions decline the calls that remain, and would be asked again for each of them."""

DECOMPOSITIONS: dict[Any, Lowering] = {}
"""Ours in torch, by the overload that they replace; `table` fills it."""

LOWERINGS: dict[Any, Lowering] = {}
"""Ours in MIL, by overload; `register` fills it."""


def decomposition(*operators: Any) -> Callable[[F], F]:
    """Registers a function for overloads of `torch.ops`; its arguments are those of the call, its results those of the operator."""
    return _registering(DECOMPOSITIONS, operators)


def lowering(*operators: Any) -> Callable[[F], F]:
    """Registers a function that emits MIL: its arguments are those of the call, tensors being variables of MIL.

    coremltools tells overloads apart by their kinds alone (`kind_of`): of each kind one overload is named, whose schema binds the
    arguments.
    """
    return _registering(LOWERINGS, operators)


def _registering(registry: dict[Any, Lowering], operators: tuple[Any, ...]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for operator in operators:
            assert operator not in registry, f"{operator} is registered twice"
            registry[operator] = function
        return function

    return decorate


def register() -> None:
    """Hands every lowering to coremltools' torch front end; calling it again changes nothing."""
    _load()
    from .binding import install

    install(LOWERINGS)


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program in the operators that are lowered: without changes in place, and without what is decomposed.

    Args:
        program: As torch.export gave it, or what this function returned.

    Returns:
        A new program that shares its weights; the given one where it came from here.

    Raises:
        Exception: What torch raises for a program that it cannot write so.
    """
    if program.graph_module.meta.get(_DONE):
        return program
    result = applied(program, table())
    result.graph_module.meta[_DONE] = True
    return result


def applied(program: ExportedProgram, decompositions: Mapping[Any, Lowering]) -> ExportedProgram:
    """The program after these decompositions and no others; itself is not changed.

    Raises:
        Exception: What torch raises for a program that it cannot write so.
    """
    with warnings.catch_warnings(), quiet("torch.export", "torch.fx"):
        # Copying a program with a loop touches a class of torch.utils._pytree that torch 2.13 itself deprecates.
        warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
        result: ExportedProgram = program.run_decompositions(dict(decompositions))
    result.graph_module.meta.update(program.graph_module.meta)
    return result


@functools.cache
def table() -> dict[Any, Lowering]:
    """For `ExportedProgram.run_decompositions`: ours, and torch's own for what coremltools does not know."""
    from torch.export import default_decompositions

    _load()
    known = known_kinds() | lowered_kinds()
    found = {
        operator: function
        for operator, function in default_decompositions().items()  # type: ignore[no-untyped-call]  # untyped
        if hasattr(operator, "_schema") and kind_of(operator) not in known and not operator._overloadname.endswith("out")
    }
    found.update(DECOMPOSITIONS)
    return found


@functools.cache
def lowered_kinds() -> frozenset[str]:
    """The kinds of operators that our own lowerings emit MIL for."""
    _load()
    return frozenset(kind_of(operator) for operator in LOWERINGS)


def _load() -> None:
    for module in _MODULES:
        importlib.import_module(f"{__name__}.{module}")


@functools.cache
def known_kinds() -> frozenset[str]:
    """The kinds of operators that coremltools converts by itself."""
    with quiet("coremltools"):
        from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    from .binding import INSTALLED

    return frozenset(kind for kind in _TORCH_OPS_REGISTRY.name_to_func_mapping if INSTALLED.get(kind, True) is not None)


def kind_of(operator: Any) -> str:
    """The name by which coremltools looks up an operator: of `aten.add.Tensor` it is `add`, of `aten.var.correction` `var.correction`."""
    from coremltools.converters.mil.frontend.torch.utils import sanitize_op_kind

    name = operator.name() if hasattr(operator, "_schema") else getattr(operator, "__name__", str(operator))
    return str(sanitize_op_kind(name))
