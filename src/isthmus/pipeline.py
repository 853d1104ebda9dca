"""The one place that knows the order of an export, and the Python API.

The order::

    model -> trace -> to_onnx -> passes -> target.unsupported -> calibrate -> target.lower -> target.build -> verify against torch -> bundle

Each step returns a new value. The PyTorch module is freed before the artifact is executed, so that two copies of the weights are never
held at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from pydantic import ValidationError

from isthmus.calibration.cases import cases_of_example, cases_of_spec, draw_inputs
from isthmus.calibration.data import RANDOM, CalibrationData, check_size
from isthmus.calibration.data import calibration_data as read_data
from isthmus.calibration.metrics import DEFAULT_TOLERANCES
from isthmus.calibration.observe import MAX, Observer, check_graph
from isthmus.calibration.report import Pictures, render, rewrite_report, write_report
from isthmus.calibration.traced import check_rounded, check_trace
from isthmus.calibration.verify import SAMPLE_TOLERANCES, module_runner, run_stage, to_array
from isthmus.exporter import bundle as bundles
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.bundle import Manifest, TensorInfo
from isthmus.exporter.errors import AccuracyError, IntegrityError, IsthmusError, UnknownNameError, UnsupportedError, UsageError
from isthmus.exporter.ops.native.torch_hook import native_kernels
from isthmus.exporter.passes import optimise
from isthmus.exporter.source import Model, Source, load_source
from isthmus.exporter.spec import Dynamic, Sampler, Samples, Tolerance
from isthmus.exporter.target import TARGETS, Job, Target
from isthmus.exporter.trace import dimension_names, trace
from isthmus.exporter.weights import nonfinite
from isthmus.results import BuildResult, ExportResult, Progress, Silent, VerifyResult, misses

_RANDOM = (
    "Calibrated on random inputs, as was asked for: the ranges say nothing of real inputs, which may saturate. "
    "Calibrate on real data before use."
)
Arrays = dict[str, np.ndarray[Any, Any]]
CaseArrays = dict[str, Arrays]


def export(
    model: Model,
    target: str,
    output: Path | None = None,
    *,
    precision: str | None = None,
    opset: int | None = None,
    batch_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    inputs: str | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
    dynamic: Sequence[Dynamic] = (),
    calibration_data: str | None = None,
    calibration_size: int | None = None,
    calibration_method: str | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    min_psnr: float | None = None,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Exports a model to a target, measures the artifact against PyTorch, and writes both as a bundle.

    Args:
        model: A registered name, `module:callable`, an nn.Module (with `inputs`), or a pair of nn.Module and example inputs. A module is
            put into eval mode.
        target: A registered target.
        output: The bundle's folder; `./MODEL-TARGET-PRECISION` by default.
        precision: One of the target's precisions, by default its first.
        opset: ONNX opset, by default the target's.
        batch_size: A fixed batch size, for registered models; by default theirs is dynamic.
        settings: Settings of a registered model to replace.
        weights: Weights to load, safetensors.
        inputs: Example inputs of a module, or `module:callable` that returns them.
        dynamic: Axes that may vary.
        calibration_data: For precisions that are calibrated: an `.npz` file or a folder of them (see `calibration.data`), or `random`; by
            default what the model sees while it samples, where it has trained weights.
        calibration_size: Number of sets of calibration inputs.
        calibration_method: How ranges are chosen: `max`, the largest |value| that was seen.
        atol: With `rtol`, replaces the bound on the relative error by |error| <= atol + rtol |reference|.
        rtol: See `atol`.
        min_psnr: Replaces the bound on the PSNR, in dB.
        seed: Seed of random weights and inputs.
        force: Replace an existing bundle.
        dry_run: Do all that decides whether the export is possible, and write nothing.
        options: The target's own options.
        progress: Told of every step.

    Raises:
        UsageError: An argument is wrong.
        UnsupportedError: The target cannot take the model; all reasons are listed.
        MachineError: An option asks for what this machine lacks.
        AccuracyError: The bundle was written, and a stage is not within tolerance; `.result` is the ExportResult.
        IsthmusError: Something failed.
    """
    step = (progress or Silent()).step
    chosen: Target[Any] = TARGETS[target]()
    precision = _choose("precision", precision, chosen.precisions)
    opset = _choose("opset", opset, chosen.opsets)
    resolved = chosen.Options.model_validate(options or {})
    chosen.check_machine(resolved)
    check_size(calibration_size)
    calibrated = precision in chosen.calibrated
    if calibration_method not in (None, MAX):
        raise UnknownNameError("calibration method", calibration_method, [MAX])
    if not calibrated and (calibration_data, calibration_size, calibration_method) != (None, None, None):
        raise UsageError(
            f"{target} in {precision} is not calibrated, so calibration data has no use",
            hint=f"leave it out, or choose --precision {' or '.join(chosen.calibrated)}" if chosen.calibrated else "leave it out",
        )
    destination = output or Path(f"{_name(model).replace(':', '-')}-{target}-{precision}")
    if not dry_run:
        bundles.check_destination(destination, force=force)

    with step("building the model"):
        source = load_source(
            model, settings=settings or {}, weights=weights, inputs=inputs, dynamic=dynamic, batch_size=batch_size, seed=seed
        )
        # Weights from a file were checked as they were read.
        if source.weights.origin == "module" and (reasons := nonfinite(source.module)):
            raise IsthmusError("the weights are not finite", reasons=reasons, hint="check the training run or the conversion of this file")
    cases = (
        cases_of_spec(dataclasses.replace(source.spec, dynamic=source.dynamic, ranges=source.ranges), source.sizes, seed)
        if source.spec
        else cases_of_example(dict(source.example), source.dynamic, source.ranges, seed)
    )
    cases["example"] = dict(source.example)
    tolerance = _tolerance(source, precision, atol, rtol, min_psnr)

    # What the artifacts are measured against must not be computed by the kernels that one of them runs.
    with step("running PyTorch"), native_kernels(False):
        run = module_runner(source.module, source.example, source.spec.outputs if source.spec else None)
        arrays = {case: {name: to_array(t) for name, t in tensors.items()} for case, tensors in cases.items()}
        reference: CaseArrays = {case: dict(run(tensors)) for case, tensors in arrays.items()}
        names = tuple(reference["example"])
        sampler = _sampler(source)
        pictures = sampler(run, np.random.Generator(np.random.PCG64(seed))) if sampler else None
        data = load_data(source, calibration_data, run, seed=seed, size=calibration_size) if calibrated else None
        notes = (
            []
            if sampler or not (source.spec and source.spec.sampler)
            else ["No pictures: the sampler's batch, or trained weights, are missing."]
        )
    with step("tracing"):
        program = trace(source.module, source.example, dynamic=source.dynamic, ranges=source.ranges)
    stages = []
    with step("checking the trace against PyTorch"), native_kernels(False):
        result, peaks = check_trace(program, source.example, arrays, reference, with_peaks=precision != "fp32")
        stages.append(result)
    if half := {"fp16": "fp16", "bf16": "bf16", "fp8": "fp16"}.get(precision):
        with step(f"running PyTorch rounded to {half}"), native_kernels(False):
            stages.append(check_rounded(program, source.example, arrays, reference, half, peaks, tolerance))
    with step("translating to ONNX"):
        onnx_model = onnx_files.to_onnx(
            program,
            opset=opset,
            input_names=list(source.example),
            output_names=names,
            dimension_names=dimension_names(program, source.dynamic, source.example),
        )
    with step("optimising the graph"):
        onnx_model = optimise(onnx_model)
    job: Job[Any] = Job(program=program, model=onnx_model, precision=precision, options=resolved, peaks=peaks, sizes=source.ranges)
    with step("checking the target's support"):
        if reasons := chosen.unsupported(job):
            raise UnsupportedError(
                f"{target} does not support {source.name} in {precision}", reasons=reasons, hint="see `isthmus list targets` for the others"
            )
    manifest = Manifest(
        model=source.name,
        target=target,
        precision=precision,
        opset=opset,
        config=_json(source.config),
        options={
            "seed": seed,
            "batch_size": batch_size,
            "settings": _json(settings or {}),
            "dynamic": {f"{name}:{axis}": size for name, axes in source.dynamic.items() for axis, size in axes.items()},
            target: resolved.model_dump(mode="json"),
        },
        inputs=_tensor_infos(onnx_model.graph.inputs, arrays),
        outputs=_tensor_infos(onnx_model.graph.outputs, reference),
        sizes={size: (r.min, r.opt, r.max) for size, r in source.ranges.items()},
        weights=source.weights,
        tolerance={key: value for key, value in dataclasses.asdict(tolerance).items() if value is not None},
        verdict=bundles.weakest(stages),
        stages=tuple(stages),
        versions=_versions(),
    )
    observed = chosen.observed(job) if data is not None else ()
    warnings = [_RANDOM] if data is not None and data.source == RANDOM else []
    if dry_run:
        return ExportResult(None, manifest.model_copy(update={"verdict": "not run"}))

    with bundles.writing(destination, force=force) as folder:
        _check_space(folder, source.weights.bytes)
        if data is not None:
            with step("calibrating"):
                observer = Observer(job.model, observed)
                job = dataclasses.replace(job, calibration=observer.observe(data))
                stages.append(check_graph(observer, arrays, reference))
                del observer
        with step(f"lowering to {target}"):
            lowered = chosen.lower(job, folder)
            bundles.write_cases(folder / bundles.INPUTS, arrays)
            bundles.write_cases(folder / bundles.OUTPUTS, reference)
        weights_bytes = source.weights.bytes
        # Every name that holds the weights, or holds something that does.
        del job, onnx_model, program, run, cases, source, model
        _release(weights_bytes)
        details = _json(lowered.details)
        manifest = manifest.model_copy(update={"device": lowered.device, "details": details, "opset": details.get("opset", opset)})
        with step(f"building for {lowered.device}"):
            built = chosen.build(folder, manifest, required=False)
        if built is not None:  # before the stages, which execute what was built
            manifest = manifest.model_copy(
                update={"device": built.device or manifest.device, "details": {**details, **_json(built.details)}}
            )
            notes += built.notes
        drawn: Samples | None = None
        for stage in chosen.stages(folder, manifest):
            if built is not None and stage.name == "device":
                stages.append(built.stage)
            with step(f"verifying the artifact: {stage.name}"):
                result, samples = run_stage(
                    stage,
                    arrays,
                    reference,
                    tolerance,
                    sampler=sampler,
                    pictures=pictures,
                    seed=seed,
                    sample_tolerance=SAMPLE_TOLERANCES.get(precision),
                )
                stages.append(result)
                drawn = samples or drawn
        if built is not None and built.stage not in stages:
            stages.append(built.stage)
        manifest = manifest.model_copy(update={"stages": tuple(stages), "verdict": bundles.weakest(stages)})
        with step("writing the report"):
            write_report(
                folder,
                manifest,
                pictures=Pictures(pictures, drawn) if pictures and drawn else None,
                facts={"notes": [*lowered.notes, *notes], "warnings": warnings},
            )
            manifest = bundles.write_manifest(folder, manifest)
    result_ = ExportResult(destination, manifest)
    if result_.exit_code:
        raise AccuracyError(
            f"{destination} was written, and its accuracy check failed",
            reasons=misses(manifest.stages),
            hint=f"see {destination / 'report.html'}; a looser bound is given with --atol, --rtol or --min-psnr",
            result=result_,
        )
    return result_


def build(bundle: Path, *, trust: bool = False, force: bool = False, progress: Progress | None = None) -> BuildResult:
    """Compiles a bundle's engine on this machine, executes it over the stored cases where the device is here, and writes both down.

    The bundle is replaced as a whole when everything is done: a build that fails or is killed leaves it as it was.

    Args:
        bundle: The bundle's folder.
        trust: Take the bundle's own libraries although they are not what its manifest says.
        force: Build again what is built.
        progress: Told of every step.

    Raises:
        UsageError: The folder is not a bundle, is built already, or is for a target that builds nothing.
        IntegrityError: A file is changed, missing or additional.
        MachineError: This machine lacks the hardware or the toolchain.
        UnsupportedError: The vendor's compiler refuses the model.
        AccuracyError: The bundle was written, and the engine is not what was asked for, or not within tolerance; `.result` is the
            BuildResult.
    """
    step = (progress or Silent()).step
    manifest = bundles.read_manifest(bundle)
    target = TARGETS[manifest.target]()
    engines = target.engines(manifest)
    if not engines:
        raise UsageError(f"{manifest.target} needs no build: {bundle} can be used as it is")
    if not force and any(stage.name == "plan" and stage.verdict == "built" for stage in manifest.stages):
        raise UsageError(f"{bundle} is built already", hint="--force builds it again")
    with step("checking the files"):
        bundles.check_integrity(bundle, manifest, trusted=engines if trust else ())
    inputs, reference = bundles.read_cases(bundle / bundles.INPUTS), bundles.read_cases(bundle / bundles.OUTPUTS)
    with bundles.rewriting(bundle) as folder:
        with step(f"building for {manifest.device}"):
            built = target.build(folder, manifest, required=True, trust=trust)
        assert built is not None
        changed = [built.stage]
        manifest = manifest.model_copy(
            update={
                "device": built.device or manifest.device,
                "details": {**manifest.details, **_json(built.details)},
                "versions": {**manifest.versions, **_versions()},
            }
        )
        for stage in target.stages(folder, manifest, trust=trust):
            if stage.name == "device":
                with step(f"verifying the artifact: {stage.name}"):
                    changed.append(run_stage(stage, inputs, reference, Tolerance(**manifest.tolerance))[0])
        names = {stage.name for stage in changed}
        stages = (*(s for s in manifest.stages if s.name not in names), *changed)
        manifest = manifest.model_copy(update={"stages": stages, "verdict": bundles.weakest(stages)})
        with step("writing the report"):
            rewrite_report(folder, manifest, notes=built.notes)
            manifest = bundles.write_manifest(folder, manifest)
    result = BuildResult(bundle, manifest, tuple(changed))
    if result.exit_code:
        raise AccuracyError(f"{bundle} was built, and the engine is not what was asked for", reasons=misses(result.stages), result=result)
    return result


def verify(bundle: Path, *, trust: bool = False, progress: Progress | None = None) -> VerifyResult:
    """Checks that a bundle's files are what its manifest says, then executes the artifact over the stored cases again.

    Args:
        bundle: The bundle's folder.
        trust: Execute an engine, or load a library, that is not what the manifest says. Such a file can run any code.
        progress: Told of every step.

    Raises:
        UsageError: The folder is not a bundle.
        IntegrityError: A file is changed, missing or additional.
        AccuracyError: A stage is not within the tolerance that the manifest holds; `.result` is the VerifyResult.
    """
    step = (progress or Silent()).step
    manifest = bundles.read_manifest(bundle)
    with step("checking the files"):
        target = TARGETS[manifest.target]()
        bundles.check_integrity(bundle, manifest, trusted=target.engines(manifest) if trust else ())
    inputs, reference = bundles.read_cases(bundle / bundles.INPUTS), bundles.read_cases(bundle / bundles.OUTPUTS)
    try:
        tolerance = Tolerance(**manifest.tolerance)
        to_run = target.stages(bundle, manifest, trust=trust)
    except (TypeError, ValidationError) as error:
        raise IntegrityError(
            f"the manifest of {bundle} cannot be used: {error}", hint="export again with this version of isthmus"
        ) from error
    if not manifest.tolerance:
        raise IntegrityError(f"the manifest of {bundle} holds no tolerance, so that nothing could fail", hint="export again")
    found = []
    for stage in to_run:
        with step(f"verifying the artifact: {stage.name}"):
            found.append(run_stage(stage, inputs, reference, tolerance)[0])
    result = VerifyResult(bundle, manifest, tuple(found))
    if result.exit_code:
        raise AccuracyError(
            f"the artifact in {bundle} is not within its tolerance of PyTorch", reasons=misses(result.stages), result=result
        )
    return result


def report(bundle: Path) -> Path:
    """Renders the report of a bundle again, from what it holds, and returns the page's path.

    A page that is missing or differs is replaced, and its hash in the manifest with it; no other hash is touched.

    Raises:
        UsageError: The folder is not a bundle.
        IntegrityError: What the page is made from is not what the manifest says.
    """
    manifest = bundles.read_manifest(bundle)
    path = bundle / "report.html"
    page = render(bundle).encode()
    if not path.is_file() or path.read_bytes() != page:
        bundles.replace_file(bundle, manifest, "report.html", page)
    return path


def inspect(bundle: Path) -> dict[str, Any]:
    """What a bundle is, as JSON values: its manifest without measurements and hashes, and the size of every file in bytes.

    A file that is missing, or whose name leads out of the bundle, has no size: `verify` says which.

    Raises:
        UsageError: The folder is not a bundle.
        IntegrityError: Its manifest is not one that this version understands.
    """
    manifest = bundles.read_manifest(bundle)
    value: dict[str, Any] = manifest.model_dump(mode="json", by_alias=True, exclude={"stages", "files"})
    value["stages"] = [{"name": s.name, "verdict": s.verdict, "reason": s.reason, "device": s.device} for s in manifest.stages]
    paths = {name: bundles.inside(bundle, name) for name in manifest.files}
    value["files"] = {name: path.stat().st_size if path is not None and path.is_file() else None for name, path in paths.items()}
    return value


def _name(model: Model) -> str:
    if isinstance(model, str):
        return model.rsplit(":", 1)[-1]
    return type(model[0] if isinstance(model, tuple) else model).__name__


def _choose(kind: str, value: Any, allowed: Sequence[Any]) -> Any:
    if value is None:
        return allowed[0]
    if value not in allowed:
        raise UnknownNameError(kind, str(value), [str(a) for a in allowed])
    return value


def _sampler(source: Source) -> Sampler | None:
    """The model's sampler, where its weights are trained ones and the artifact will take its batches."""
    sampler = source.spec.sampler if source.spec and source.weights.origin in ("shipped", "file") else None
    if sampler is None:
        return None
    allowed = source.ranges.get("batch")
    fits = allowed.min <= sampler.batch <= allowed.max if allowed else source.sizes.get("batch") == sampler.batch
    return sampler if fits else None


def load_data(
    source: Source,
    text: str | None,
    run: Callable[[Mapping[str, np.ndarray[Any, Any]]], Mapping[str, np.ndarray[Any, Any]]],
    *,
    seed: int,
    size: int | None,
) -> CalibrationData:
    """The calibration inputs of a model; see `calibration.data.calibration_data`."""
    example = {name: to_array(tensor) for name, tensor in source.example.items()}

    def draw(rng: np.random.Generator) -> Arrays:
        tensors = source.spec.inputs(rng, source.sizes) if source.spec else draw_inputs(dict(source.example), rng)
        return {name: to_array(tensor) for name, tensor in tensors.items()}

    return read_data(text, example=example, dynamic=source.dynamic, sampler=_sampler(source), run=run, draw=draw, seed=seed, size=size)


def _tolerance(source: Source, precision: str, atol: float | None, rtol: float | None, min_psnr: float | None) -> Tolerance:
    base = (source.spec.tolerances if source.spec else {}).get(precision) or DEFAULT_TOLERANCES[precision]
    if atol is not None or rtol is not None:
        base = dataclasses.replace(base, max_relative=None, atol=atol or 0.0, rtol=rtol or 0.0)
    return base if min_psnr is None else dataclasses.replace(base, min_psnr=min_psnr)


def _tensor_infos(values: Sequence[ir.Value], cases: CaseArrays) -> tuple[TensorInfo, ...]:
    infos = []
    for value in values:
        assert value.name is not None
        assert value.dtype is not None
        seen = [a for arrays in cases.values() if (a := arrays[value.name]).size and a.dtype != np.bool_]
        infos.append(
            TensorInfo(
                name=value.name,
                dtype=str(value.dtype.numpy()),
                shape=tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ()),
                range=(min(float(a.min()) for a in seen), max(float(a.max()) for a in seen)) if seen else None,
            )
        )
    return tuple(infos)


def _check_space(folder: Path, weight_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = weight_bytes + 16 * 2**20
    if free < needed:
        raise IsthmusError(
            f"the disk of {folder.parent} has {free / 2**20:.0f} MiB free, and the bundle needs about {needed / 2**20:.0f} MiB",
            hint="free some space, or give a folder on another disk with -o",
        )


def _release(weight_bytes: int) -> None:
    """Gives the module's memory back to the system, so that the artifact's weights do not come on top of it."""
    gc.collect()
    if weight_bytes > 2**26 and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("isthmus", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _json(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
