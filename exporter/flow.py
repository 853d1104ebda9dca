"""The values that flow through a traced program, whatever form it has: an ONNX graph, a PyTorch program or an ML Program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from .runner import Runner
from .spec import Arrays


@dataclass(frozen=True)
class Step:
    """One node of a program.

    Attributes:
        name: The node's name.
        operator: What it computes: an ONNX operator, an ATen operator, a MIL operation.
        module: The path of the PyTorch module whose `forward` it belongs to; empty for the outermost, and for nodes of unknown origin.
        inputs: Names of the values that it reads, those inside its subgraphs among them.
        outputs: Names of the values that it makes.
    """

    name: str
    operator: str
    module: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operator} {self.name}"


@dataclass(frozen=True)
class Flow:
    """A program as a list of steps.

    Attributes:
        steps: In the order in which they can be executed.
        inputs: Names of the program's inputs, in order.
        outputs: Names of the values that it returns, in order.
    """

    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def activations(self) -> frozenset[str]:
        """The values that depend on an input; the others are weights, and what is computed of weights alone."""
        found = set(self.inputs)
        for step in self.steps:
            if not found.isdisjoint(step.inputs):
                found.update(step.outputs)
        return frozenset(found)


class Values(ABC):
    """A program that tells the values inside it, a few at a time. A context manager: leaving it frees what it holds.

    Attributes:
        flow: The program.
        device: What executes it, in words.
        opaque: Why only its outputs can be seen; empty for a program that can be looked into.
    """

    flow: Flow
    device: str
    opaque: str = ""

    @abstractmethod
    def shapes(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
        """The shapes that values have on these inputs; a name is missing where there is no tensor of that name.

        Raises:
            IsthmusError: The program fails.
        """

    @abstractmethod
    def read(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, np.ndarray[Any, Any]]:
        """Executes the program once and returns the named values. All of them are in memory at once: how many, the caller decides.

        Raises:
            IsthmusError: The program fails.
        """

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Frees what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class RunnerValues(Values):
    """A runner that gives its outputs and nothing else.

    Args:
        runner: Is closed with this.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.
        why: Why nothing else is looked at, where the runner is not the reason.
    """

    def __init__(self, runner: Runner, inputs: Sequence[str], outputs: Sequence[str], why: str = "") -> None:
        self._runner = runner
        self.flow = Flow((), tuple(inputs), tuple(outputs))
        self.device = runner.device
        self.opaque = f"not run: {why}" if why else f"not run: {runner.device} gives the model's outputs only"

    def shapes(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
        """See `Values.shapes`."""
        return {name: array.shape for name, array in self.read(inputs, names).items()}

    def read(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, np.ndarray[Any, Any]]:
        """See `Values.read`."""
        found = {**self._runner.run(inputs), **inputs}
        return {name: found[name] for name in names if name in found}

    def close(self) -> None:
        """Frees the runner."""
        self._runner.close()
