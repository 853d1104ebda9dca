"""Where a bundle's artifact differs from PyTorch, stage by stage and module by module. Part of the Python API, see `pipeline`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from isthmus.calibrating import sampler_of
from isthmus.calibration.bisect import Culprit, Form, StageDiff, arisen, culprit, examine
from isthmus.calibration.diff import MEMORY, Reference, apart
from isthmus.calibration.half import module_peaks
from isthmus.calibration.onnx_values import OnnxValues
from isthmus.calibration.rounded_values import RoundedValues
from isthmus.calibration.row import Figures, threshold_of
from isthmus.calibration.trajectory import against_timestep, sampled_calls
from isthmus.calibration.unquantised import RemoveQuantisation
from isthmus.calibration.verify import SAMPLES, module_runner
from isthmus.exporter import bundle as bundles
from isthmus.exporter.errors import IntegrityError, MachineError, Reason, UsageError
from isthmus.exporter.flow import RunnerValues, Values
from isthmus.exporter.manifest import Manifest
from isthmus.exporter.ops import native
from isthmus.exporter.ops.native.torch_hook import native_kernels
from isthmus.exporter.options import check_settings
from isthmus.exporter.passes.half_precision import overflowing
from isthmus.exporter.paths import StrPath
from isthmus.exporter.sampling import GraphSampler
from isthmus.exporter.source import Source, load_source
from isthmus.exporter.spec import MODELS, Arrays, SizeRange
from isthmus.exporter.target import TARGETS, Stage, Target
from isthmus.exporter.trace import trace
from isthmus.results import Progress, Silent
from isthmus.targets.coreml.rules.program import packages_of
from isthmus.targets.coreml.session import Interface
from isthmus.targets.coreml.values import MilValues

TORCH = "torch"
"""What stands for the PyTorch module in `diff`."""

_ONNX = "model.onnx"


@dataclass(frozen=True)
class BisectResult:
    """Which module first went wrong.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        stages: Every stage, in order; those that were not run say why.
    """

    bundle: Path
    manifest: Manifest
    stages: tuple[StageDiff, ...]

    @property
    def culprit(self) -> Culprit | None:
        """The first module over the threshold, in the first stage that has one; None when there is none."""
        return culprit(self.stages)

    @property
    def exit_code(self) -> int:
        """3 when a module is over the threshold; 5 when this machine could run no stage, so that nothing was judged; else 0."""
        if not any(stage.rows for stage in self.stages):
            return 5
        return 3 if self.culprit is not None else 0

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "bundle": str(self.bundle),
            "model": self.manifest.model,
            "target": self.manifest.target,
            "precision": self.manifest.precision,
            "culprit": self.culprit.value() if self.culprit is not None else None,
            "arisen": arisen(self.stages),
            "stages": [stage.value() for stage in self.stages],
            "exit_code": self.exit_code,
        }


@dataclass(frozen=True)
class DiffResult:
    """How far an artifact is from PyTorch, or from another artifact, module by module.

    Attributes:
        a: The bundle that the other is compared with, or `torch`.
        b: The bundle that is judged.
        manifest: Its manifest.
        stage: Its last stage that can be looked into, against PyTorch.
        other: The same of `a`; None where that is PyTorch.
        apart: For each module that is visible in both, how far B's result is from A's; empty where A is PyTorch.
    """

    a: Path | str
    b: Path
    manifest: Manifest
    stage: StageDiff
    other: StageDiff | None = None
    apart: Mapping[str, Figures] = dataclasses.field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """3 when a module of B is over the threshold; 5 when this machine cannot run B's artifact, so that nothing was judged; else 0."""
        if not self.stage.rows:
            return 5
        return 3 if self.stage.over else 0

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "a": str(self.a),
            "b": str(self.b),
            "model": self.manifest.model,
            "stage": self.stage.value(),
            "other": self.other.value() if self.other is not None else None,
            "apart": {module: figures.value() for module, figures in self.apart.items()},
            "exit_code": self.exit_code,
        }


def bisect(
    bundle: StrPath,
    *,
    model: str | None = None,
    weights: StrPath | None = None,
    threshold: float | None = None,
    memory: int = MEMORY,
    cases: Sequence[str] = (),
    trust: bool = False,
    progress: Progress | None = None,
) -> BisectResult:
    """Finds the module that first went wrong on the way from PyTorch to a bundle's artifact, and the stage in which it did.

    Every stage is compared with PyTorch in float32, module by module: PyTorch rounded to the artifact's dtype, the ONNX graph, with Q/DQ,
    the ML Program in its interpreter. What gives its outputs only, an engine or Core AI, is compared at the outputs.

    Args:
        bundle: The bundle's folder.
        model: `module:callable` of a model that is not registered.
        weights: The weights file that the export was given.
        threshold: The relative error above which a module has gone wrong; by default that of each stage's precision.
        memory: Bytes of values that may be held at a time, beside the weights.
        cases: The bundle's cases to use; all by default.
        trust: See `verify`.
        progress: Told of every step.

    Raises:
        UsageError: The folder is not a bundle, its model cannot be rebuilt, or the weights are not its own.
        IntegrityError: A file is changed, missing or additional.
        IsthmusError: PyTorch or a stage fails.
    """
    bundle = Path(bundle)
    step = (progress or Silent()).step
    opened = open_bundle(bundle, cases, trust=trust, step=step)
    with step("building the model"):
        source = rebuild(opened.manifest, opened.example, model=model, weights=weights)
    reference = Reference(source.module, source.example)
    found = []
    for form in forms(opened, source, trust=trust):
        with step(f"comparing {form.name}"), native_kernels(False):
            found.append(examine(reference, form, opened.cases, threshold=threshold, memory=memory))
    return BisectResult(bundle, opened.manifest, tuple(found))


def diff(
    a: StrPath,
    b: StrPath,
    *,
    model: str | None = None,
    weights: StrPath | None = None,
    threshold: float | None = None,
    memory: int = MEMORY,
    cases: Sequence[str] = (),
    trust: bool = False,
    progress: Progress | None = None,
) -> DiffResult:
    """Compares a bundle's artifact with PyTorch, or with another bundle's of the same model, module by module.

    Args:
        a: A bundle's folder, or `torch`.
        b: The same, and the one that is judged; where it is `torch`, A is.
        model: See `bisect`, as for the others.
        weights: The weights file.
        threshold: The relative error above which a module has gone wrong.
        memory: Bytes of values that may be held at a time.
        cases: B's cases to use.
        trust: See `verify`.
        progress: Told of every step.

    Raises:
        UsageError: The bundles are not of one model, settings and weights, or do not take the same inputs; all reasons are listed. And as
            of `bisect`.
        IntegrityError, IsthmusError: See `bisect`.
    """
    step = (progress or Silent()).step
    sides = [Path(side) for side in (a, b) if str(side) != TORCH]
    if not sides:
        raise UsageError("both sides are PyTorch", hint="give a bundle's folder in the place of one")
    opened = [open_bundle(side, cases if i == len(sides) - 1 else (), trust=trust, step=step) for i, side in enumerate(sides)]
    judged = opened[-1]
    if len(opened) == 2 and (reasons := _incomparable(opened[0].manifest, judged.manifest)):
        raise UsageError(f"{a} and {b} cannot be compared", reasons=reasons, hint="compare bundles of one model, with one set of weights")
    with step("building the model"):
        source = rebuild(judged.manifest, judged.example, model=model, weights=weights)
    reference = Reference(source.module, source.example)
    last = [artifact(each, trust=trust) for each in opened]
    stages = []
    for each, form in zip(opened, last, strict=True):
        with step(f"comparing {each.folder.name}: {form.name}"), native_kernels(False):
            stages.append(examine(reference, form, judged.cases, threshold=threshold, memory=memory))
    between: Mapping[str, Figures] = {}
    if len(opened) == 2 and last[0].open is not None and last[1].open is not None and all(s.device for s in stages):
        with step("comparing one with the other"), native_kernels(False), last[0].open() as first, last[1].open() as second:
            between = apart(reference, first, second, judged.cases, memory=memory)
    other = stages[0] if len(stages) == 2 else None
    return DiffResult(sides[0] if len(sides) == 2 else TORCH, judged.folder, judged.manifest, stages[-1], other, between)


def errors_by_timestep(
    bundle: StrPath,
    *,
    count: int = 8,
    model: str | None = None,
    weights: StrPath | None = None,
    memory: int = MEMORY,
    trust: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The errors of a bundle's modules along the trajectory of its model's sampler, as JSON values; see `trajectory.against_timestep`.

    Args:
        bundle: The bundle's folder.
        count: How many of the sampler's calls, evenly spaced.
        model: `module:callable` of a model that is not registered; it has no sampler, and is refused for that.
        weights: The weights file that the export was given.
        memory: Bytes of values that may be held at a time, beside the weights.
        trust: See `verify`.
        progress: Told of every step.

    Raises:
        UsageError: The model has no sampler, or not with these weights and this batch. And as of `bisect`.
        MachineError: This machine cannot run the artifact.
        IntegrityError, IsthmusError: See `bisect`.
    """
    bundle = Path(bundle)
    step = (progress or Silent()).step
    opened = open_bundle(bundle, (), trust=trust, step=step)
    with step("building the model"):
        source = rebuild(opened.manifest, opened.example, model=model, weights=weights)
    sampler = sampler_of(source)
    if not isinstance(sampler, GraphSampler):
        raise UsageError(
            f"{opened.manifest.model} draws no pictures with these weights and this batch size, so that there is no trajectory",
            hint="that needs a registered model that has a sampler, its trained weights, and a batch of the sampler's size",
        )
    form = artifact(opened, trust=trust)
    if form.open is None:
        raise MachineError(f"the artifact in {bundle} was not run: {form.reason}", hint="see `isthmus doctor`")
    reference = Reference(source.module, source.example)
    with step("following the trajectory"), native_kernels(False), form.open() as values:
        run = module_runner(source.module, source.example, source.spec.outputs if source.spec else None)
        calls = sampled_calls(sampler, run, seed=opened.manifest.options.get("seed", 0), count=count)
        time = sampler.loop().time
        return against_timestep(reference, values, calls, time, threshold=form.bound, memory=memory)


@dataclass(frozen=True)
class Opened:
    """A bundle whose files are what its manifest says.

    Attributes:
        folder: Its folder.
        manifest: Its manifest.
        cases: The inputs of each case that is used.
        example: The inputs of its first case.
    """

    folder: Path
    manifest: Manifest
    cases: Mapping[str, Arrays]
    example: Arrays

    @property
    def target(self) -> Target[Any]:
        """Its target."""
        return TARGETS[self.manifest.target]()


def open_bundle(folder: Path, wanted: Sequence[str], *, trust: bool, step: Callable[[str], Any]) -> Opened:
    """Reads a bundle whose files are what its manifest says.

    Args:
        folder: Its folder.
        wanted: The cases to use; all when none is named.
        trust: See `verify`.
        step: Told of every step.

    Raises:
        UsageError: The folder is not a bundle, or has no such case.
        IntegrityError: A file is changed, missing or additional.
    """
    manifest = bundles.read_manifest(folder)
    with step(f"checking the files of {folder.name}"):
        bundles.check_integrity(folder, manifest, trusted=TARGETS[manifest.target]().engines(manifest) if trust else ())
    inputs = {case: arrays for case, arrays in bundles.read_cases(folder / bundles.INPUTS).items() if case != SAMPLES}
    if not inputs:
        raise IntegrityError(f"{folder} holds no inputs", hint="export again")
    if unknown := [case for case in wanted if case not in inputs]:
        raise UsageError(f"{folder} has no case {', '.join(unknown)}", hint=f"its cases are {', '.join(inputs)}")
    return Opened(
        folder, manifest, {case: arrays for case, arrays in inputs.items() if not wanted or case in wanted}, next(iter(inputs.values()))
    )


def rebuild(manifest: Manifest, example: Arrays, *, model: str | None, weights: StrPath | None) -> Source:
    """The PyTorch module that a bundle was exported from.

    Args:
        manifest: The bundle's manifest.
        example: The inputs of one of its cases.
        model: `module:callable` of a model that is not registered.
        weights: The weights file that the export was given.

    Raises:
        UsageError: What the manifest does not hold was not given, or what was given is not what was exported.
        IntegrityError: The manifest's settings are not those of its model.
    """
    registered = model is None and manifest.model in MODELS
    if not registered and model is None:
        raise UsageError(
            f"the model {manifest.model} is not registered, and a bundle does not hold the code of its model",
            hint="give --model module:callable, as the export was given",
        )
    if manifest.weights.origin == "file" and weights is None:
        raise UsageError(
            f"{manifest.model} was exported with the weights of {manifest.weights.path}, which a bundle does not hold for PyTorch",
            hint=f"give --weights with the file whose sha256 is {manifest.weights.sha256[:16]}…",
        )
    settings: dict[str, Any] = {}
    if registered:
        settings, reasons = check_settings(MODELS.entry(manifest.model), manifest.config)
        if reasons:
            raise IntegrityError(f"the manifest's settings of {manifest.model} cannot be used", reasons=reasons, hint="export again")
    tensors = tuple(torch.from_numpy(np.array(example[info.name], copy=True)) for info in manifest.inputs)
    source = load_source(
        manifest.model if model is None else model,
        settings=settings,
        weights=weights,
        inputs=None if registered else tensors,
        dynamic=(),
        batch_size=manifest.options.get("batch_size") if registered else None,
        seed=manifest.weights.seed or 0,
    )
    if source.weights.sha256 != manifest.weights.sha256:
        raise UsageError(
            f"the weights are not those that {manifest.model} was exported with",
            reasons=[
                Reason(f"sha256 is {source.weights.sha256}, expected {manifest.weights.sha256}", where=source.weights.path or "the module")
            ],
            hint="give the same --weights, or the same version of the code of the model, as the export was given",
        )
    names = [info.name for info in manifest.inputs]
    return dataclasses.replace(source, example=dict(zip(names, tensors, strict=True)))


def forms(opened: Opened, source: Source, *, trust: bool = False) -> list[Form]:
    """The forms that a bundle's program takes, in order: PyTorch in the artifact's dtype, and every stage of the target."""
    manifest, target = opened.manifest, opened.target
    half = target.computes.get(manifest.precision)
    found = []
    if half is not None:
        found.append(Form("torch-dtype", half, lambda: _rounded(opened, source, half)))
    for stage in target.stages(opened.folder, manifest, trust=trust):
        if stage.sampling:
            continue
        if stage.name == "quantized" and not _smoothed(manifest):
            found.append(Form("onnx", half or "fp32", lambda: _unquantised(opened, source)))
        found.append(_form(opened, stage))
    return found


def artifact(opened: Opened, *, trust: bool = False) -> Form:
    """The last stage of a bundle that can be looked into; where there is none, the last."""
    stages = [stage for stage in opened.target.stages(opened.folder, opened.manifest, trust=trust) if not stage.sampling]
    inside = [stage for stage in stages if stage.name in ("onnx", "quantized", "mil") and stage.open is not None]
    return _form(opened, (inside or stages)[-1])


def _form(opened: Opened, stage: Stage) -> Form:
    manifest, folder = opened.manifest, opened.folder
    opener, bound = stage.open, threshold_of(manifest.precision, manifest.tolerance.get("min_psnr"))

    def form(open_: Callable[[], Values] | None) -> Form:
        return Form(stage.name, manifest.precision, open_, stage.reason if open_ is None else "", bound)

    if opener is None:
        return form(None)
    path = folder / _ONNX
    if stage.name in ("onnx", "quantized") and path.is_file() and not _smoothed(manifest):
        return form(lambda: OnnxValues(path))
    if stage.name == "native" and path.is_file():
        return form(lambda: OnnxValues(path, kernels=native.library()))
    packages = packages_of(manifest)
    if stage.name == "mil" and len(packages) == 1:
        shapes = {info.name: opened.example[info.name].shape for info in manifest.inputs}
        return form(lambda: MilValues(folder / packages[0], Interface.of(manifest), shapes))
    inputs, outputs = [info.name for info in manifest.inputs], [info.name for info in manifest.outputs]
    # Results of modules are rescaled there on purpose, and would be taken for errors of the modules that were rescaled.
    why = "--smooth moved scales between modules, whose results are not PyTorch's" if _smoothed(manifest) else ""
    return form(lambda: RunnerValues(opener(), inputs, outputs, why))


def _smoothed(manifest: Manifest) -> bool:
    return manifest.options.get("smooth") is not None


def _rounded(opened: Opened, source: Source, half: str) -> Values:
    """PyTorch rounded to `half`, as the export checked it: modules whose values leave the dtype's range stay in float32."""
    manifest = opened.manifest
    dynamic: dict[str, dict[int, str]] = {}
    for place, size in manifest.options.get("dynamic", {}).items():
        name, _, axis = place.rpartition(":")
        dynamic.setdefault(name, {})[int(axis)] = size
    ranges = {size: SizeRange(*bounds) for size, bounds in manifest.sizes.items()}
    program = trace(source.module, source.example, dynamic=dynamic, ranges=ranges)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[half]
    _, peaks = module_peaks(program, Reference(source.module, source.example).tensors(opened.example))
    return RoundedValues(program, source.example, dtype, overflowing(peaks, torch.finfo(dtype).max))


def _unquantised(opened: Opened, source: Source) -> Values:
    model = ir.load(opened.folder / _ONNX)
    RemoveQuantisation(dict(source.module.named_parameters()))(model)
    return OnnxValues(model)


def _incomparable(a: Manifest, b: Manifest) -> list[Reason]:
    """Why two bundles cannot be compared module by module; empty when they can."""
    reasons = []
    if a.model != b.model:
        reasons.append(Reason(f"A is {a.model}, B is {b.model}", where="model"))
    for key in sorted(a.config.keys() | b.config.keys()):
        if a.config.get(key) != b.config.get(key):
            reasons.append(Reason(f"A has {a.config.get(key)!r}, B has {b.config.get(key)!r}", where=f"config {key}"))
    if a.weights.sha256 != b.weights.sha256:
        reasons.append(Reason(f"A has sha256 {a.weights.sha256[:16]}…, B has {b.weights.sha256[:16]}…", where="weights"))
    theirs = {info.name: info for info in a.inputs}
    for info in b.inputs:
        if info.name not in theirs:
            reasons.append(Reason("A has no such input", where=f"input {info.name}"))
            continue
        sizes = list(zip(theirs[info.name].shape, info.shape, strict=False))
        if len(theirs[info.name].shape) != len(info.shape) or any(isinstance(x, int) and x != y for x, y in sizes):
            reasons.append(Reason(f"A takes {theirs[info.name].shape}, B takes {info.shape}", where=f"input {info.name}"))
    return reasons
