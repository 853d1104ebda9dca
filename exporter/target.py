"""Something that models are exported to: `Target`, and the `register_target` decorator.

A target is one folder under `targets/`. Its module imports no SDK at the top: every target lists on every machine, and says through
`capabilities` what it can do on this one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar, cast

from pydantic import BaseModel, ValidationError

from .errors import Reason, UsageError
from .grids import Array, RoundedWeight
from .manifest import Table
from .ranges import CalibrationTable
from .registry import Registry
from .runner import Runner
from .sampling import LoopSampler
from .spec import Arrays, SizeRange, Tolerance

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from .manifest import Manifest, StageResult
    from .passes.fp8_layers import Layer

O = TypeVar("O", bound=BaseModel)  # noqa: E741 - the options of a target


@dataclass(frozen=True)
class Capability:
    """What this machine can do for a target.

    Attributes:
        name: `lower`, `build` or `verify`.
        available: True when it works here.
        detail: What was found (a version), or what is missing.
        fix: What to install, when it is not available.
    """

    name: str
    available: bool
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Job(Generic[O]):
    """What a target is asked to lower.

    Attributes:
        program: The traced PyTorch program.
        model: The same as ONNX, after the target-independent passes; None for a target without opsets, unless the precision is calibrated:
            its values are what is observed, for every target. See `onnx`.
        precision: One of the target's `precisions`.
        options: The target's own options.
        input_names: Names of the graph's inputs, in order.
        output_names: Names of its outputs, in order.
        peaks: Module path to the largest |value| that the module computed on the example inputs; empty in fp32.
        sizes: The range of each named size that occurs in the shapes of the graph's inputs.
        calibration: What was observed of the ONNX graph's values on calibration data; None where the precision needs none.
        weights: Codes of weights that are not rounded to nearest on the scales of their largest values, by the weights' names.
        corrections: What is added to the outputs of quantised layers, (outputs,) by the names of their nodes.
        loop: The sampler to write as one graph around the model; None for a sampler that calls it from outside.
    """

    program: torch.export.ExportedProgram
    model: ir.Model | None
    precision: str
    options: O
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    peaks: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, SizeRange] = field(default_factory=dict)
    calibration: CalibrationTable | None = None
    weights: Mapping[str, RoundedWeight] = field(default_factory=dict)
    corrections: Mapping[str, Array] = field(default_factory=dict)
    loop: LoopSampler | None = None

    @property
    def onnx(self) -> ir.Model:
        """The program as ONNX. Not to be changed in place: a target that rewrites makes a copy."""
        assert self.model is not None, "a target that reads the ONNX graph has opsets"
        return self.model


@dataclass(frozen=True)
class Lowered:
    """What a target wrote.

    Attributes:
        device: What the artifact is for, in words (`any ONNX Runtime`, `NVIDIA H100 (sm_90)`).
        notes: Facts for the report, in sentences.
        details: Figures for the manifest (node counts, islands, …), JSON values only.
        tables: Figures for the report that are tables.
    """

    device: str
    notes: tuple[str, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Examined:
    """What a lowered artifact says itself, beside what `Lowered` says.

    Attributes:
        notes: Facts for the report, in sentences.
        details: Figures for the manifest, JSON values only.
        tables: Figures for the report that are tables.
    """

    notes: tuple[str, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Built:
    """What a build made of a lowered artifact.

    Attributes:
        stage: The result: `built`; `blocked` when the vendor's compiler refuses the artifact, or made something else than was asked for;
            `lowered` when it was not tried because this machine cannot.
        device: What the artifact is for now, in words; empty when that is as it was.
        notes: Facts for the report, in sentences.
        details: Figures for the manifest, JSON values only.
    """

    stage: StageResult
    device: str = ""
    notes: tuple[str, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Embedded:
    """A program that was written around an artifact.

    Attributes:
        name: What it is called in its language.
        notes: Facts for people, in sentences: what was not compiled, and what was left out.
    """

    name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A way to execute a written artifact, and so to verify it.

    Attributes:
        name: One of the bundle's stage names (`onnx`, `native`, `quantized`, `sampler`, `plan`, `mil`, `coreai`, `device`).
        open: Makes the runner, or None when this machine cannot run the stage.
        reason: Why it cannot; empty when it can.
        required: The user asked for this stage by name: a machine that cannot run it is an error, not a `not run`.
        sampling: What it runs draws whole pictures (see `sampling`): it takes the case `samples`, and no other.
    """

    name: str
    open: Callable[[], Runner] | None
    reason: str = ""
    required: bool = False
    sampling: bool = False


class Target(ABC, Generic[O]):
    """Something that models are exported to.

    Class attributes:
        name: The registered name.
        summary: One line for people.
        precisions: What `--precision` may ask for; the first is the default.
        opsets: The ONNX opsets that the lowering accepts; the first is the default. Empty for a target that lowers from the PyTorch program
            alone: nothing is translated to ONNX then.
        calibrated: The precisions whose ranges come from calibration data.
        rounded: The precisions of weights alone, for which calibration data has one use: `--weight-rounding gptq`.
        computes: Precision to the dtype (`fp16` or `bf16`) that its arithmetic is rounded to, for those that round.
        tolerances: The bounds of a precision, where they are not those of `calibration.metrics.DEFAULT_TOLERANCES`.
        samplers: What `--sampler` may ask for, the default first: `step`, a loop outside of the artifact, and `loop`, one in it.
        languages: The languages that a bundle's artifact can be embedded in; see `embed`.
        Options: The target's own options, a pydantic model whose fields become command line options.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    calibrated: ClassVar[tuple[str, ...]] = ()
    rounded: ClassVar[tuple[str, ...]] = ()
    samplers: ClassVar[tuple[str, ...]] = ("step",)
    languages: ClassVar[tuple[str, ...]] = ()
    computes: ClassVar[Mapping[str, str]] = {"fp16": "fp16", "bf16": "bf16", "fp8": "fp16"}
    tolerances: ClassVar[Mapping[str, Tolerance]] = {}
    opsets: ClassVar[tuple[int, ...]]
    Options: ClassVar[type[BaseModel]]

    @abstractmethod
    def capabilities(self) -> list[Capability]:
        """What this machine can lower, build and verify for this target. Imports the SDK, never raises."""

    @abstractmethod
    def check_machine(self, options: O) -> None:
        """Refuses options that ask for what this machine lacks, before any work is done.

        Raises:
            MachineError: An option asks for hardware or a toolchain that is not here.
        """

    def fixes_sizes(self, options: O) -> str:  # noqa: ARG002 - for those that fix them
        """The option that fixes every size of the graph at that of the example, as the user would write it; empty where sizes may vary."""
        return ""

    @abstractmethod
    def unsupported(self, job: Job[O]) -> list[Reason]:
        """Every reason why the target cannot take the model; empty when it can."""

    @abstractmethod
    def lower(self, job: Job[O], folder: Path) -> Lowered:
        """Writes the artifact's files into `folder`, which exists and is empty of them.

        Raises:
            IsthmusError: Lowering failed.
        """

    def observed(self, job: Job[O]) -> tuple[str, ...]:  # noqa: ARG002 - for those that quantise
        """The names of the values of `job.onnx` whose ranges the lowering needs, for the `calibrated` precisions.

        Raises:
            UsageError: The options do not fit the model.
        """
        return ()

    def quantised(self, job: Job[O]) -> tuple[Layer, ...]:  # noqa: ARG002 - for those that quantise
        """The layers of `job.onnx` whose operands the lowering quantises, for the `calibrated` precisions.

        Raises:
            UsageError: The options do not fit the model.
        """
        return ()

    def examine(self, folder: Path, manifest: Manifest, example: Arrays) -> Examined:  # noqa: ARG002 - for those that have to read it back
        """What the files of a lowered artifact say themselves: for what has to be read back from them.

        It is called when the module is gone, so that what is read does not come on top of the model's own weights.

        Args:
            folder: Where `lower` wrote them.
            manifest: With the details that `lower` gave.
            example: The model's example inputs.

        Raises:
            IsthmusError: The files cannot be read.
        """
        return Examined()

    def build(self, folder: Path, manifest: Manifest, *, required: bool, trust: bool = False) -> Built | None:  # noqa: ARG002 - for others
        """Compiles the lowered artifact in `folder` for its device, and writes the engine beside it; None where there is nothing to build.

        Args:
            folder: The bundle's folder, writable.
            manifest: Its manifest.
            required: The user asked for the build by name; else it is done when this machine can.
            trust: Load libraries of the bundle that are not those that were made with it.

        Raises:
            MachineError: `required`, and this machine lacks the hardware or the toolchain.
            IsthmusError: The build failed.
        """
        return None

    def engines(self, manifest: Manifest) -> tuple[str, ...]:  # noqa: ARG002 - for those that build
        """The files of a bundle that a compiler makes of it, and that can run code: by name, whether they are there or not."""
        return ()

    def embed(self, folder: Path, manifest: Manifest, language: str, destination: Path, *, sampler: LoopSampler | None = None) -> Embedded:
        """Writes a program that runs the artifact.

        Args:
            folder: The bundle's folder, whose files are what its manifest says.
            manifest: Its manifest.
            language: One of `languages`.
            destination: A folder that exists and is empty.
            sampler: How pictures are drawn with the model; None where that is not known.

        Raises:
            UnsupportedError: The program cannot take the model; all reasons are listed.
        """
        raise NotImplementedError(f"{self.name} has no languages, and was asked for {language}")

    @abstractmethod
    def stages(self, folder: Path, manifest: Manifest, *, trust: bool = False) -> list[Stage]:
        """The stages at which the artifact in `folder` can be executed, in order.

        Args:
            folder: The bundle's folder.
            manifest: Its manifest.
            trust: Execute `engines` that isthmus did not build for this bundle. Never taken from the bundle itself.
        """


TARGETS: Registry[type[Target[BaseModel]]] = Registry("target", "targets", "register_target")

C = TypeVar("C", bound=type[Target])  # type: ignore[type-arg]  # of any options


def target_options(target: Target[O], given: Mapping[str, object]) -> O:
    """The options of a target, with its defaults for those that are not given.

    Raises:
        UsageError: Some are none of the target's, or have values that it does not take; all are listed.
    """
    try:
        return cast("O", target.Options.model_validate(given))  # a class variable cannot be generic
    except ValidationError as error:
        reasons = [
            Reason(f"got {detail['input']!r}: {detail['msg']}", where=".".join(map(str, detail["loc"])))
            for detail in error.errors(include_url=False)
        ]
        raise UsageError(f"options of {target.name} cannot be used", reasons=reasons, hint="see `isthmus export --help`") from error


def register_target(name: str, *, summary: str) -> Callable[[C], C]:
    """Registers a target class. `name` and `summary` must be literals (see `registry`)."""

    def decorate(cls: C) -> C:
        cls.name = name
        cls.summary = summary
        TARGETS.register(name, cls)
        return cls

    return decorate
