"""Which PyTorch module every value of an ML Program was computed in: noted when a program is converted, and kept in its package.

coremltools carries a number from a node of the PyTorch program (`debug_handle`) to every operation that is made of it, through all its
passes. The numbers stand for modules here. What came of it is written into the package's metadata, under `KEY`, as JSON: module path to
the names of its values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...exporter.errors import IntegrityError

if TYPE_CHECKING:
    import torch

KEY = "isthmus.modules"
"""The key in the metadata of a package."""

_HANDLE = "debug_handle"


def number_modules(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Numbers the nodes of a program, in place, before it is converted.

    Args:
        program: As `coremltools.convert` gets it: a decomposition makes new nodes.

    Returns:
        The module path of each number, `""` for the root.
    """
    numbers: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            node.meta[_HANDLE] = numbers.setdefault(_path(node), len(numbers))
    return tuple(numbers)


def _path(node: torch.fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("L['self'].").removeprefix("L['self']").lstrip(".")


def module_of(operation: Any, modules: tuple[str, ...]) -> str:
    """The module path of an operation of a program that is being converted (`coremltools.converters.mil.mil.Operation`).

    Args:
        operation: Any operation; `""` for one that came out of no node.
        modules: What `number_modules` gave.
    """
    from coremltools.converters.mil.mil.scope import ScopeSource

    for number in operation.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE, ()):
        if number is not None:
            return modules[int(number)]
    return ""


def modules_text(program: Any, modules: tuple[str, ...]) -> str:
    """What goes into a package's metadata: the modules of the values of a converted program that is still in memory, as JSON.

    Args:
        program: `coremltools.converters.mil.mil.Program`, such as the `_mil_program` of what `coremltools.convert` returns.
        modules: What `number_modules` gave.
    """
    from .interpreter.program import operations_in

    found: dict[str, list[str]] = {}
    for function in program.functions.values():
        for operation in operations_in(function):
            if operation.op_type != "const":
                names = found.setdefault(module_of(operation, modules), [])
                names += [variable.name for variable in operation.outputs]
    return json.dumps({path: list(dict.fromkeys(names)) for path, names in found.items()}, separators=(",", ":"))


def read_modules(metadata: Mapping[str, str]) -> dict[str, str]:
    """The module path of each value, by its name, from a package's metadata; empty for a package that was written without.

    Raises:
        IntegrityError: The metadata holds something else under `KEY`.
    """
    text = metadata.get(KEY)
    if text is None:
        return {}
    try:
        return {name: path for path, names in json.loads(text).items() for name in _texts(names)}
    except (ValueError, AttributeError, TypeError) as error:
        raise IntegrityError(
            f"the package's metadata {KEY} is damaged: {error}, expected module paths with lists of names", hint="export again"
        ) from error


def _texts(names: Iterable[Any]) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"got {names!r:.40}")
    return names
