"""The values inside a package, as the interpreter computes them, by the PyTorch module that they were computed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...exporter.flow import Flow, Step, Values
from ...exporter.spec import Arrays
from .interpreter import Interpreter, load
from .interpreter.program import used_by
from .modules import read_modules
from .session import Interface

Array = np.ndarray[Any, Any]


class MilValues(Values):
    """One package in the interpreter of ML Programs. Its values go by one after the other; what is not asked for is not kept.

    Args:
        path: The `.mlpackage`. What module a value belongs to is read from its metadata; see `modules`.
        interface: What it is called with.
        shapes: The shapes of the inputs, by PyTorch's names: of a package with several functions, the one for these is taken.

    Raises:
        IsthmusError: The package cannot be read.
        UnsupportedError: It has operations that the interpreter does not know.
    """

    device = "interpreter of ML Programs"

    def __init__(self, path: Path, interface: Interface, shapes: Mapping[str, tuple[int, ...]]) -> None:
        from coremltools.models.utils import load_spec

        self._interface = interface
        like: dict[str, Array] = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        values, _ = interface.given(like)
        program = load(path)
        self._interpreter: Any = Interpreter(program, interface.function(values))
        modules = read_modules(load_spec(str(path)).description.metadata.userDefined)
        steps = steps_of(program.functions[self._interpreter.function], modules)
        self.flow = Flow(steps, tuple(interface.inputs[name] for name in shapes), tuple(interface.outputs))

    def shapes(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
        """See `Values.shapes`."""
        wanted, found = frozenset(names), dict[str, tuple[int, ...]]()

        def watch(name: str, value: Array) -> None:
            if name in wanted:
                found[name] = np.shape(value)

        self._run(inputs, watch)
        return found

    def read(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, Array]:
        """See `Values.read`."""
        wanted, found = frozenset(names), dict[str, Array]()

        def watch(name: str, value: Array) -> None:
            if name in wanted:
                found[name] = np.array(value, copy=True)

        self._run(inputs, watch)
        return found

    def close(self) -> None:
        """Frees the program and its weights."""
        self._interpreter = None

    def _run(self, inputs: Arrays, watch: Callable[[str, Array], None]) -> None:
        values, states = self._interface.given(inputs)
        self._interpreter.run(values, states, watch)


def steps_of(block: Any, modules: Mapping[str, str]) -> tuple[Step, ...]:
    """The operations of a block as steps; one with blocks of its own is one step, and constants are none.

    Args:
        block: A function or block of a MIL program.
        modules: The PyTorch module of each value, by its name.
    """
    steps = []
    for operation in block.operations:
        if operation.op_type == "const":
            continue
        outputs = tuple(variable.name for variable in operation.outputs)
        reads = tuple(dict.fromkeys(variable.name for variable in used_by(operation) if variable is not None))
        module = next((modules[name] for name in outputs if name in modules), "")
        steps.append(Step(operation.name, operation.op_type, module, reads, outputs))
    return tuple(steps)
