"""Executes packages: in the interpreter of this folder on any machine, in Core ML itself on a Mac."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...exporter.errors import IsthmusError, MachineError, UsageError
from ...exporter.manifest import Manifest, TensorInfo
from ...exporter.runner import Runner
from ...exporter.spec import Arrays
from .chunks import Chain
from .convert import identifiers

Array = np.ndarray[Any, Any]

COMPUTE_UNITS = {"all": "ALL", "cpu-and-ne": "CPU_AND_NE", "cpu-and-gpu": "CPU_AND_GPU", "cpu-only": "CPU_ONLY"}
"""The option's values, and the names of `coremltools.ComputeUnit`."""


def on_a_mac() -> bool:
    """Whether Core ML is part of this system."""
    return platform.system() == "Darwin"


@dataclass(frozen=True)
class Interface:
    """What a package calls the inputs and outputs of a PyTorch model, and how it holds them.

    Attributes:
        inputs: Name in PyTorch to name in the package, states among them.
        outputs: Name in the package to what PyTorch returns: name, dtype and shape. Without those that are states.
        states: Name of a state in the package to the output that is its value after a call.
        functions: Name of a function to the shape of each input in the package; empty for a package with one.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, TensorInfo]
    states: Mapping[str, TensorInfo] = field(default_factory=dict)
    functions: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)

    @staticmethod
    def of(manifest: Manifest) -> Interface:
        """The interface of a bundle."""
        details = manifest.details
        names = [info.name for info in manifest.inputs]
        after: Mapping[str, str] = details.get("state_outputs", {})
        outputs = {info.name: info for info in manifest.outputs}
        returned = dict(zip(identifiers(list(outputs)), outputs.values(), strict=True))
        return Interface(
            inputs=dict(zip(names, identifiers(names), strict=True)),
            outputs={name: info for name, info in returned.items() if info.name not in after.values()},
            states={name: outputs[output] for name, output in after.items()},
            functions={name: {key: tuple(shape) for key, shape in shapes.items()} for name, shapes in details.get("functions", {}).items()},
        )

    def given(self, inputs: Arrays) -> tuple[dict[str, Array], dict[str, Array]]:
        """The values of a call as the package takes them: inputs, and states. Core ML has no scalars, and takes vectors of one for them."""
        values = {self.inputs.get(name, name): np.atleast_1d(np.asarray(array)) for name, array in inputs.items()}
        states = {name: np.array(values.pop(name), np.float16) for name in self.states if name in values}
        return values, states

    def function(self, values: Mapping[str, Array]) -> str | None:
        """The function for the shapes of these values; None where the package has one.

        Raises:
            UsageError: There is none.
        """
        if not self.functions:
            return None
        got = {name: array.shape for name, array in values.items()}
        for name, shapes in self.functions.items():
            if got == shapes:
                return name
        known = "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in shapes.items())}" for name, shapes in self.functions.items())
        raise UsageError(f"no function takes {', '.join(f'{k} {v}' for k, v in got.items())}", hint=f"the functions are {known}")

    def returned(self, outputs: Arrays, states: Arrays) -> dict[str, Array]:
        """What a call gave, under PyTorch's names, and in its dtypes and shapes: Core ML has no int64, and no scalars.

        What packages pass to each other is left out.
        """
        found = {info.name: _like(outputs[name], info) for name, info in self.outputs.items() if name in outputs}
        return found | {info.name: _like(states[name], info) for name, info in self.states.items()}


class MilRunner(Runner):
    """The interpreter of ML Programs over saved packages.

    Args:
        packages: The `.mlpackage`s, each fed what those before it computed.
        interface: What they are called with.

    Raises:
        IsthmusError: A package cannot be read.
        UnsupportedError: It has operations that the interpreter does not know.
    """

    device = "interpreter of ML Programs"

    def __init__(self, packages: Sequence[Path], interface: Interface) -> None:
        from .interpreter import load

        self._interface = interface
        self._programs: list[Any] = [load(package) for package in packages]
        self._chains: dict[str | None, Chain] = {}
        for function in interface.functions or (None,):
            self._chains[function] = Chain(self._programs, function)

    def run(self, inputs: Arrays) -> Arrays:
        """Executes the packages once; see `Runner.run`."""
        values, states = self._interface.given(inputs)
        outputs = self._chains[self._interface.function(values)].run(values, states)
        return self._interface.returned(outputs, states)

    def close(self) -> None:
        """Frees the programs and their weights."""
        self._programs, self._chains = [], {}


class CoreMLRunner(Runner):
    """Core ML over saved packages, on a Mac.

    Args:
        packages: See `MilRunner`.
        units: One of `COMPUTE_UNITS`.
        interface: See `MilRunner`.

    Raises:
        MachineError: This is no Mac.
        IsthmusError: Core ML refuses a package.
    """

    def __init__(self, packages: Sequence[Path], units: str, interface: Interface) -> None:
        if not on_a_mac():
            raise MachineError("Core ML is part of macOS, and this machine is no Mac", hint="run `isthmus verify` on a Mac")
        self._interface = interface
        self._parts: dict[str | None, list[_Part]] = {}
        self.device = f"Core ML on {platform.processor() or 'a Mac'}, {units}"
        for function in interface.functions or (None,):
            self._parts[function] = [_Part(package, units, function) for package in packages]

    def run(self, inputs: Arrays) -> Arrays:
        """Executes the packages once; see `Runner.run`."""
        values, states = self._interface.given(inputs)
        outputs: dict[str, Array] = {}
        for part in self._parts[self._interface.function(values)]:
            results = part.run(values, states)
            values |= results
            outputs |= results
        return self._interface.returned(outputs, states)

    def close(self) -> None:
        """Frees the models."""
        self._parts = {}


class _Part:
    """One package in Core ML."""

    def __init__(self, package: Path, units: str, function: str | None) -> None:
        import coremltools as ct

        options = {} if function is None else {"function_name": function}
        try:
            self._model: Any = ct.models.MLModel(str(package), compute_units=getattr(ct.ComputeUnit, COMPUTE_UNITS[units]), **options)
        except Exception as error:  # coremltools passes on what the framework raises
            raise IsthmusError(
                f"Core ML refuses {package.name}: {error}", hint="see the error; `isthmus lint` may name the cause"
            ) from error
        description = self._model.get_spec().description
        described = next((f for f in description.functions if f.name == function), description)
        self._inputs = {value.name: _dtype(value) for value in described.input}
        self._states = tuple(value.name for value in described.state)

    def run(self, values: Mapping[str, Array], states: dict[str, Array]) -> dict[str, Array]:
        """From the values that the package reads, among others, to its outputs; states are changed."""
        given = {name: values[name].astype(dtype, copy=False) for name, dtype in self._inputs.items() if name in values}
        try:
            if not self._states:
                return dict(self._model.predict(given))
            state = self._model.make_state()
            for name in self._states:
                if name in states:
                    state.write_state(name, states[name])
            results = dict(self._model.predict(given, state=state))
            states.update({name: np.asarray(state.read_state(name)) for name in self._states})
            return results
        except Exception as error:  # coremltools passes on what the framework raises
            raise IsthmusError(f"Core ML failed: {error}", hint="see the error; `isthmus lint` may name the cause") from error


def _like(array: Any, info: TensorInfo) -> Array:
    array = np.asarray(array)
    found: Array = array.astype(info.dtype)
    return found.reshape([1] * len(info.shape)) if array.size == 1 else found


def _dtype(value: Any) -> np.dtype[Any]:
    from coremltools.proto import FeatureTypes_pb2 as types

    kinds = {types.ArrayFeatureType.FLOAT16: np.float16, types.ArrayFeatureType.INT32: np.int32}
    return np.dtype(kinds.get(value.type.multiArrayType.dataType, np.float32))
