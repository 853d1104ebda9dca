"""What the rules of ML Programs look at: converted programs, and what is known of how they will be used.

Nothing is imported at the top that needs torch or coremltools: every rule is loaded when rules are listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ....exporter.bundle import INPUTS, inside, read_cases, read_manifest
from ....exporter.errors import IntegrityError, MachineError, UsageError
from ....exporter.lint import Match
from ....exporter.manifest import Manifest
from ..modules import read_modules
from .chips import GENERATIONS, OLDEST, check_chip

if TYPE_CHECKING:
    from ....exporter.spec import Arrays
    from ..interpreter import Interpreter
    from ..interpreter.program import Accepted
    from ..session import Interface

Variable = Any
"""`coremltools.converters.mil.mil.Var`; coremltools has no types."""

Operation = Any
"""`coremltools.converters.mil.mil.Operation`."""

PACKAGE = ".mlpackage"

_STORED = ("const", "constexpr_")


@dataclass(frozen=True)
class Package:
    """One ML Program.

    Attributes:
        program: What `interpreter.load` gives. Not to be changed.
        files: Its weight files, with their sizes in bytes.
        modules: The PyTorch module of each value, by its name; empty where that is not known.
    """

    program: Any
    files: Mapping[str, int] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgramSubject:
    """The ML Programs of an artifact, one for each package, and their circumstances.

    Attributes:
        packages: In the order in which they run: each reads what those before it gave.
        target: The target's registered name; empty when it is not known.
        manifest: The bundle's manifest; None for a package that is in none.
        chip: A name of `chips.GENERATIONS`; empty for programs that are to run on all of them.
        peaks: The largest |value| of each value of the programs on example inputs, by its name, as `observed_peaks` gives it; None when
            nobody looked.
        function: The only function to look at; empty for all.
    """

    packages: tuple[Package, ...]
    target: str = ""
    manifest: Manifest | None = None
    chip: str = ""
    peaks: Mapping[str, float] | None = None
    function: str = ""
    reads: ClassVar[Literal["mil"]] = "mil"

    @property
    def precision(self) -> str:
        """The precision that was asked for; empty when it is not known."""
        return self.manifest.precision if self.manifest else ""

    @property
    def generation(self) -> int:
        """Of the chip's Neural Engine; the oldest when none is named."""
        return GENERATIONS[self.chip] if self.chip else OLDEST

    @property
    def laid_out(self) -> bool:
        """Whether it was exported with `--layout ane`, so that no finding should say to do so; False where that is not known."""
        options = self.manifest.options.get("coreml") if self.manifest else None
        return isinstance(options, dict) and options.get("layout") == "ane"

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """The PyTorch module of each value, by its name; empty where that is not known."""
        return {name: path for package in self.packages for name, path in package.modules.items()}

    @cached_property
    def _operations(self) -> tuple[Operation, ...]:
        from ..interpreter.program import operations_in

        found = (op for _, _, function in self.functions() for op in operations_in(function))
        return tuple(op for op in found if not op.op_type.startswith(_STORED) and not all(stored(v) for v in op.outputs))

    def operations(self, *kinds: str) -> Iterator[Operation]:
        """What is computed at run time, of every function and of the blocks inside; of these types, when some are named."""
        yield from (op for op in self._operations if not kinds or op.op_type in kinds)

    def functions(self) -> Iterator[tuple[Package, str, Any]]:
        """Package, name and block of every function."""
        for package in self.packages:
            for name, block in package.program.functions.items():
                if self.function in ("", name):
                    yield package, name, block

    def parts(self) -> Iterator[ProgramSubject]:
        """A subject for every function alone."""
        for package, name, _ in self.functions():
            yield replace(self, packages=(package,), function=name)

    def flexible_inputs(self) -> Iterator[tuple[str, Accepted]]:
        """The inputs of flexible shape, by name, with the shapes that they take."""
        from ..interpreter.program import accepted_shapes

        for package, name, _ in self.functions():
            yield from accepted_shapes(package.program, name).items()

    def states(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The states, by name, with their shapes."""
        from coremltools.converters.mil.mil import types

        for _, _, function in self.functions():
            for name, variable in function.inputs.items():
                if types.is_state(variable.sym_type):
                    yield name, tuple(int(size) for size in variable.sym_type.wrapped_type().get_shape())

    def match(self, operation: Operation, what: str, fix: str = "") -> Match:
        """A match at an operation."""
        name = operation.outputs[0].name if operation.outputs else operation.name
        return Match(what, name=name, where=self.modules.get(name, ""), fix=fix)

    def peak(self, variable: Variable) -> float | None:
        """The largest |value| that was seen of it, infinite where it was no number; None when nobody looked."""
        peak = None if self.peaks is None else self.peaks.get(variable.name)
        return math.inf if peak is not None and math.isnan(peak) else peak


def read_program(path: Path, target: str | None = None, *, chip: str = "", observe: bool = False) -> ProgramSubject:
    """Reads a bundle of Core ML, or a package.

    Args:
        path: A bundle's folder, or a folder that ends in `.mlpackage`.
        target: Whose rules; by default the bundle's target, and Core ML for a package.
        chip: See `ProgramSubject`.
        observe: Run the programs on the bundle's example inputs, for the rules that need to know how large values become.

    Raises:
        UsageError: There is no such chip, the bundle holds no package, or `observe` is given for what holds no example inputs.
        MachineError: coremltools, which reads programs, is not installed.
        IntegrityError: The bundle's manifest cannot be used, or a package of it is missing.
        IsthmusError: A package cannot be read, or not be run.
    """
    check_chip(chip)
    if find_spec("coremltools") is None:
        raise MachineError("coremltools is not installed, so no ML Program can be read", hint="pip install 'isthmus[coreml]'")
    if path.suffix == PACKAGE:
        if observe:
            raise UsageError(f"{path} holds no example inputs to observe it with", hint="give the bundle that holds the package")
        return ProgramSubject((_read_package(path),), target=target or "coreml", chip=chip)
    manifest = read_manifest(path)
    names = packages_of(manifest)
    if not names:
        raise UsageError(f"the bundle {path} holds no {PACKAGE}", hint="give a bundle of coreml, or a package")
    packages = []
    for name in names:
        folder = inside(path, name)
        if folder is None or not folder.is_dir():
            raise IntegrityError(f"{name} of the bundle {path} is missing or leads out of it", hint="export again")
        packages.append(_read_package(folder))
    subject = ProgramSubject(tuple(packages), target=target or manifest.target, manifest=manifest, chip=chip)
    if observe:
        from ..session import Interface

        cases = read_cases(path / INPUTS) if INPUTS in manifest.files else {}
        programs = [package.program for package in packages]
        subject = replace(subject, peaks=observed_peaks(programs, cases, Interface.of(manifest)))
    return subject


def packages_of(manifest: Manifest) -> tuple[str, ...]:
    """The packages of a bundle, by their names in it: those of its chunks in their order, or all that it holds."""
    named = manifest.details.get("packages")
    if isinstance(named, list) and named and all(isinstance(name, str) for name in named):
        return tuple(named)
    parts = (Path(name).parts for name in sorted(manifest.files))
    return tuple(dict.fromkeys(held[0] for held in parts if held and held[0].endswith(PACKAGE)))


def _read_package(path: Path) -> Package:
    from coremltools.models.utils import load_spec

    from ..interpreter import load

    program = load(path)
    files = {f"{path.name}/{file.relative_to(path).as_posix()}": file.stat().st_size for file in sorted(path.rglob("*.bin"))}
    return Package(program, files, read_modules(load_spec(str(path)).description.metadata.userDefined))


def observed_peaks(programs: Sequence[Any], cases: Mapping[str, Arrays], interface: Interface) -> dict[str, float]:
    """Runs programs, one after the other, on inputs, and keeps the largest |value| of every floating-point value.

    Args:
        programs: What `interpreter.load` gives, in order.
        cases: The inputs of each run, by the case's name, as PyTorch calls them. Cases that the programs do not take are left out: a
            sampler's noise, and sizes other than fixed ones.
        interface: What the programs call them.

    Returns:
        The peaks by the values' names; infinite where a value was not a number.

    Raises:
        UsageError: No case fits.
        UnsupportedError, IsthmusError: See `Interpreter`.
    """
    from ..interpreter import Interpreter

    peaks: dict[str, float] = {}

    def watch(name: str, value: np.ndarray[Any, Any]) -> None:
        if value.dtype.kind == "f" and value.size:
            peak = float(np.max(np.abs(value)))
            peaks[name] = max(peaks.get(name, 0.0), math.inf if math.isnan(peak) else peak)

    refused = "there is none"
    runs: dict[str | None, list[Interpreter]] = {}
    for case in cases.values():
        values, states = interface.given(case)
        try:
            function = interface.function(values)
            if function not in runs:
                runs[function] = [Interpreter(program, function) for program in programs]
            for run in runs[function]:
                values |= run.run({name: values[name] for name in run.inputs if name in values}, states, watch)
        except UsageError as error:
            refused = f"{error.message}: {'; '.join(map(str, error.reasons))}"
    if not peaks:
        raise UsageError(f"no case of the bundle's example inputs fits the program ({refused})", hint="export again")
    return peaks


# What rules ask of variables.


def stored(variable: Any) -> bool:
    """Whether a variable is a weight or another constant, compressed or not."""
    return variable is not None and (variable.val is not None or (variable.op is not None and variable.op.op_type.startswith(_STORED)))


def shape(variable: Variable) -> tuple[int, ...]:
    """The sizes; those that vary count as 1."""
    return tuple(int(n) if isinstance(n, int | np.integer) else 1 for n in variable.shape or ())


def dtype(variable: Variable) -> str:
    """`fp16`, `fp32`, `int32`, `bool` and so on."""
    from coremltools.converters.mil.mil import types

    name: str = types.builtin_to_string(variable.dtype)
    return name


def tensors(operation: Operation) -> Iterator[Variable]:
    """The variables that an operation reads, lists of them one by one."""
    for value in operation.inputs.values():
        yield from value if isinstance(value, list | tuple) else (value,)


def number(variable: Any) -> float | None:
    """The value of a constant with one element; None for anything else."""
    value = None if variable is None else variable.val
    return (
        float(np.asarray(value).reshape(-1)[0])
        if value is not None and np.size(value) == 1 and np.asarray(value).dtype.kind in "fiub"
        else None
    )


def made_by(variable: Any, *kinds: str) -> Operation | None:
    """The operation that computes a variable, when it is of one of these types."""
    operation = getattr(variable, "op", None)
    return operation if operation is not None and operation.op_type in kinds else None


def casts_away(variable: Variable) -> Variable:
    """What a variable is a cast of, or itself."""
    while (operation := made_by(variable, "cast")) is not None:
        variable = operation.x
    return variable
