"""The one place that knows the order of an export, and the Python API.

The order::

    model -> trace -> to_onnx -> passes -> target.unsupported -> calibrate -> target.lower -> target.build -> verify against torch -> bundle

Each step returns a new value. The PyTorch module is freed before the artifact is executed, so that two copies of the weights are never
held at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.analysing import AnalysisResult, analyse
from isthmus.arguments import choose, choose_opset, graph_sampler, name_of, tolerance_of
from isthmus.calibrating import (
    ROUNDINGS,
    CalibrateResult,
    calibrate,
    calibrates,
    check_table,
    draw_data,
    read_data,
    readers,
    rounded_job,
    sampler_of,
    scaled_job,
    smoothed_job,
    unquantised,
    warnings_of,
)
from isthmus.calibration.calibrator import CALIBRATORS, channel_calibrator
from isthmus.calibration.cases import cases_of_example, cases_of_spec
from isthmus.calibration.data import check_preprocess, check_size
from isthmus.calibration.observe import Observer, check_graph
from isthmus.calibration.recipe import Recipe, read_recipe
from isthmus.calibration.report import Pictures, write_report
from isthmus.calibration.statistics import Gathering
from isthmus.calibration.table import calibration_table as calibration_table_of
from isthmus.calibration.table import report_table
from isthmus.calibration.traced import check_rounded, check_trace
from isthmus.calibration.verify import SAMPLE_TOLERANCES, SAMPLES, module_runner, run_stage, to_array
from isthmus.calibration.weights import gathering
from isthmus.differences import BisectResult, DiffResult, bisect, diff
from isthmus.embedding import EmbedResult, embed
from isthmus.exporter import bundle as bundles
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter import ranges
from isthmus.exporter.destination import check_destination, check_space, writing
from isthmus.exporter.errors import AccuracyError, IsthmusError, Reason, UnsupportedError, UsageError
from isthmus.exporter.grids import ACTIVATION_GRIDS, WEIGHT_GRIDS
from isthmus.exporter.manifest import Manifest, Table, TensorInfo, weakest
from isthmus.exporter.memory import release, settled
from isthmus.exporter.ops.native.torch_hook import native_kernels
from isthmus.exporter.passes import optimise
from isthmus.exporter.passes.sampling_loop import misfits
from isthmus.exporter.paths import StrPath
from isthmus.exporter.preprocess import parse_preprocess
from isthmus.exporter.source import Model, load_source
from isthmus.exporter.spec import Dynamic, Samples
from isthmus.exporter.target import TARGETS, Job, Target, target_options
from isthmus.exporter.trace import dimension_names, input_shapes, output_shapes, trace
from isthmus.exporter.weights import nonfinite
from isthmus.finished import build, inspect, verify
from isthmus.reporting import compare_reports, report
from isthmus.results import BuildResult, ExportResult, Progress, Silent, VerifyResult, json_values, misses, tool_versions
from isthmus.tuning import TuneResult, tune

__all__ = [
    "AnalysisResult",
    "BisectResult",
    "BuildResult",
    "CalibrateResult",
    "DiffResult",
    "EmbedResult",
    "ExportResult",
    "TuneResult",
    "VerifyResult",
    "analyse",
    "bisect",
    "build",
    "calibrate",
    "compare_reports",
    "diff",
    "embed",
    "export",
    "inspect",
    "report",
    "tune",
    "verify",
]

Arrays = dict[str, np.ndarray[Any, Any]]
CaseArrays = dict[str, Arrays]


def export(
    model: Model,
    target: str,
    output: StrPath | None = None,
    *,
    precision: str | None = None,
    opset: int | None = None,
    batch_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
    weights: StrPath | None = None,
    inputs: str | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
    dynamic: Sequence[Dynamic] = (),
    calibration_data: str | None = None,
    calibration_size: int | None = None,
    calibration_method: str | None = None,
    calibration_preprocess: str | None = None,
    calibration_table: StrPath | None = None,
    weight_rounding: str | None = None,
    weight_scales: str | None = None,
    smooth: float | None = None,
    recipe: Recipe | StrPath | None = None,
    sampler: str | None = None,
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
        weights: Weights to load: a `.safetensors` file, a folder in the diffusers layout, or a `.pth` (see `exporter.pth`).
        inputs: Example inputs of a module, or `module:callable` that returns them.
        dynamic: Axes that may vary.
        calibration_data: For precisions that are calibrated: an `.npz` or `.safetensors` file, a folder of them or of pictures,
            `module:callable` (see `calibration.files`), or `random`; by default what the model sees while it samples, where it has trained
            weights.
        calibration_size: Number of sets of calibration inputs.
        calibration_method: How ranges are chosen, a registered calibrator: `max` by default.
        calibration_preprocess: What becomes of pictures, see `exporter.preprocess`.
        calibration_table: The ranges themselves, in place of data: a file that `calibrate` wrote, or `calibration.json` of another bundle.
        weight_rounding: How weights are rounded in precisions that are calibrated or have a target's `rounded` weights: `nearest`, the
            default, or `gptq` (see `calibration.rounding`).
        weight_scales: What the scale of each channel of a matrix represents in them, of each block in INT4: `max`, the default, or
            `mse` (see `calibration.calibrator`).
        smooth: The alpha of SmoothQuant, from 0 to 1, see `passes.smooth_activations`; by default activations stay as they are.
        recipe: What `tune` found, or its file: precision, patterns of modules, and how ranges and weights are chosen. What else is asked
            for must not contradict it.
        sampler: `step`, the default, for the graph of one step, which a sampler calls; `loop` for one more graph that draws whole pictures
            (see `exporter.sampling`).
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
    if recipe is not None:
        recipe = recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe))
        asked_for = {"precision": precision, "calibration_method": calibration_method, "weight_rounding": weight_rounding, "smooth": smooth}
        said, contradictions = recipe.arguments({**(options or {}), **asked_for}, takes=chosen.Options.model_fields)
        if contradictions:
            raise UsageError("the recipe and the call contradict each other", reasons=contradictions)
        precision, calibration_method = said.pop("precision"), said.pop("calibration_method", calibration_method)
        weight_rounding, smooth = said.pop("weight_rounding", weight_rounding), said.pop("smooth", smooth)
        options = {**(options or {}), **said}
    precision = choose("precision", precision, chosen.precisions)
    sampler = choose("sampler", sampler, chosen.samplers)
    resolved = target_options(chosen, options or {})
    opset = choose_opset(chosen, opset)
    chosen.check_machine(resolved)
    check_size(calibration_size)
    calibrated = calibrates(
        chosen, precision, data=calibration_data, size=calibration_size, method=calibration_method, preprocess=calibration_preprocess,
        table=calibration_table, rounding=weight_rounding, scales=weight_scales, smooth=smooth,
    )  # fmt: skip
    method = CALIBRATORS.entry(calibration_method or "max").name
    preprocess = parse_preprocess(calibration_preprocess) if calibration_preprocess is not None else None
    weight_rounding = choose("weight rounding", weight_rounding, ROUNDINGS)
    weight_scales = channel_calibrator(weight_scales or "max").name
    given = ranges.read_table(Path(calibration_table)) if calibration_table is not None else None
    check_preprocess(calibration_data, preprocess)
    destination = Path(output or f"{name_of(model).replace(':', '-')}-{target}-{precision}")
    if not dry_run:
        check_destination(destination, force=force)

    with step("building the model"):
        source = load_source(
            model,
            settings=settings or {},
            weights=weights,
            inputs=inputs,
            dynamic=dynamic,
            batch_size=batch_size,
            seed=seed,
            fixed=chosen.fixes_sizes(resolved),
        )
        # Weights from a file were checked as they were read.
        if source.weights.origin == "module" and (reasons := nonfinite(source.module)):
            raise IsthmusError("the weights are not finite", reasons=reasons, hint="check the training run or the conversion of this file")
        data = (
            read_data(source, calibration_data, seed=seed, size=calibration_size, preprocess=preprocess)
            if calibrated and given is None
            else None
        )
        if given is not None:
            check_table(given, calibration_table, source)
    cases = (
        cases_of_spec(dataclasses.replace(source.spec, dynamic=source.dynamic, ranges=source.ranges), source.sizes, seed)
        if source.spec
        else cases_of_example(dict(source.example), source.dynamic, source.ranges, seed)
    )
    cases["example"] = dict(source.example)
    in_graph = graph_sampler(source) if sampler == "loop" else None
    tolerance = tolerance_of(source, chosen, precision, atol, rtol, min_psnr)

    # What the artifacts are measured against must not be computed by the kernels that one of them runs.
    with step("running PyTorch"), native_kernels(False):
        run = module_runner(source.module, source.example, source.spec.outputs if source.spec else None)
        arrays = {case: {name: to_array(t) for name, t in tensors.items()} for case, tensors in cases.items()}
        reference: CaseArrays = {case: dict(run(tensors)) for case, tensors in arrays.items()}
        names = tuple(reference["example"])
        drawing = sampler_of(source)
        pictures = drawing(run, np.random.Generator(np.random.PCG64(seed))) if drawing else None
        noise, latents = in_graph.loop_case(run, np.random.Generator(np.random.PCG64(seed))) if in_graph else ({}, {})
        # The steps' cases, and the one of the whole sampler where it is asked for.
        all_inputs = {**arrays, **({SAMPLES: dict(noise)} if in_graph else {})}
        all_outputs = {**reference, **({SAMPLES: dict(latents)} if in_graph else {})}
        if calibrated and given is None and data is None:
            data = draw_data(source, run, seed=seed, size=calibration_size)
        notes = (
            []
            if drawing or not (source.spec and source.spec.sampler)
            else ["No pictures: the sampler's batch, or trained weights, are missing."]
        )
    with step("tracing"):
        program = trace(source.module, source.example, dynamic=source.dynamic, ranges=source.ranges)
    stages = []
    with step("checking the trace against PyTorch"), native_kernels(False):
        result, peaks = check_trace(program, source.example, arrays, reference, with_peaks=precision != "fp32")
        stages.append(result)
    if half := chosen.computes.get(precision):
        with step(f"running PyTorch rounded to {half}"), native_kernels(False):
            # What is narrower than that is not part of this stage, nor is its looser bound.
            bounds = tolerance_of(source, chosen, half, atol, rtol, min_psnr)
            stages.append(check_rounded(program, source.example, arrays, reference, half, peaks, bounds))
    dimensions = dimension_names(program, source.dynamic, source.example)
    onnx_model = None
    if opset is not None or calibrated:  # every target's ranges are those of the same graph
        with step("translating to ONNX"):
            onnx_model = onnx_files.to_onnx(
                program,
                opset=opset or onnx_files.OPSETS[0],
                input_names=list(source.example),
                output_names=names,
                dimension_names=dimensions,
            )
        with step("optimising the graph"):
            onnx_model = optimise(onnx_model)
    job: Job[Any] = Job(
        program=program,
        model=onnx_model,
        precision=precision,
        options=resolved,
        input_names=tuple(source.example),
        output_names=names,
        peaks=peaks,
        sizes=source.ranges,
        loop=in_graph.loop() if in_graph else None,
    )
    with step("checking the target's support"):
        if reasons := [*chosen.unsupported(job), *(misfits(job.onnx.graph, job.loop) if job.loop else ())]:
            raise UnsupportedError(
                f"{target} does not support {source.name} in {precision}", reasons=reasons, hint="see `isthmus list targets` for the others"
            )
    of_weights = {"weight_rounding": weight_rounding, "weight_scales": weight_scales, "smooth": smooth}
    manifest = Manifest(
        model=source.name,
        target=target,
        precision=precision,
        opset=opset,
        config=json_values(source.config),
        options={
            "seed": seed,
            "batch_size": batch_size,
            "sampler": sampler,
            **(of_weights if calibrated or precision in chosen.rounded else {}),
            **({"calibration_table": ranges.FILE} if given is not None else {}),
            **({"calibration_size": calibration_size} if calibration_size is not None else {}),
            **({"calibration_preprocess": calibration_preprocess} if calibration_preprocess is not None else {}),
            **({"recipe": recipe.sha256()} if isinstance(recipe, Recipe) else {}),
            "settings": json_values(settings or {}),
            "dynamic": {f"{name}:{axis}": size for name, axes in source.dynamic.items() for axis, size in axes.items()},
            target: resolved.model_dump(mode="json"),
        },
        inputs=_tensor_infos(arrays, input_shapes(program, dimensions)),
        outputs=_tensor_infos(reference, output_shapes(program, dimensions)),
        sizes={size: (r.min, r.opt, r.max) for size, r in source.ranges.items()},
        weights=source.weights,
        tolerance={key: value for key, value in dataclasses.asdict(tolerance).items() if value is not None},
        verdict=weakest(stages),
        stages=tuple(stages),
        versions=tool_versions(),
    )
    observed = chosen.observed(job) if calibrated else ()
    if given is not None:
        given.require(observed, ACTIVATION_GRIDS[precision])
    warnings = (*warnings_of(data if given is None else given.data), *unquantised(chosen, job))
    if dry_run:
        return ExportResult(None, manifest.model_copy(update={"verdict": "not run"}), warnings)

    with writing(destination, force=force) as folder:
        # Weights in a file of their own are shared by the graphs of the step and the sampler.
        copies = 2 if job.loop and source.weights.bytes <= onnx_files.EXTERNAL_DATA_BYTES else 1
        check_space(folder, copies * source.weights.bytes)
        used: dict[str, object] = {}  # what the manifest says of the calibration
        observed_table: list[Table] = []
        if calibrated:
            with step("calibrating"), settled():
                job, smoothed = smoothed_job(job, observed, data, smooth)
                notes += smoothed
                observer = Observer(job.onnx, observed)
                gathered: Gathering | None = None
                layers = chosen.quantised(job) if weight_rounding == "gptq" and data is not None else ()
                if data is not None:
                    if layers:
                        gathered = gathering(job.onnx, layers, len(data.sets))
                    table = calibration_table_of(
                        observer.observe(data, tell=gathered.see if gathered is not None else None),
                        data,
                        method=method,
                        grids=ACTIVATION_GRIDS.get(precision, ()),
                        model=source.name,
                        weights=source.weights.sha256,
                        seed=seed,
                        modules=readers(job.onnx, observed),
                    )
                else:
                    assert given is not None
                    table = given
                used = table.summary()
                observed_table.append(report_table(table))
                job = dataclasses.replace(job, calibration=table)
                bundles.write_text(folder / ranges.FILE, table.json_text())
                if layers and data is not None:
                    job = rounded_job(job, layers, observer, data, WEIGHT_GRIDS[precision], gathered, weight_scales)
            with step("checking the graph that was observed"):
                plain = check_graph(observer, arrays, reference)
                if chosen.opsets:
                    stages.append(plain)
                elif plain.verdict == "failed":
                    raise IsthmusError("the graph that is observed does not compute what PyTorch does", reasons=[Reason(plain.reason)])
                del observer
        if weight_scales != "max" and weight_rounding != "gptq":
            with step("choosing the scales of weights"), settled():
                job = scaled_job(job, chosen.quantised(job), WEIGHT_GRIDS[precision], weight_scales)
        with step(f"lowering to {target}"), settled():
            lowered = chosen.lower(job, folder)
            bundles.write_cases(folder / bundles.INPUTS, all_inputs)
            bundles.write_cases(folder / bundles.OUTPUTS, all_outputs)
        weights_bytes = source.weights.bytes
        # Every name that holds the weights, or holds something that does.
        del job, onnx_model, program, run, cases, source, model
        release(weights_bytes)
        details = json_values(lowered.details)
        manifest = manifest.model_copy(update={"device": lowered.device, "details": details, "opset": details.get("opset", opset)})
        with step("reading the artifact back"):
            examined = chosen.examine(folder, manifest, arrays["example"])
        details = json_values({**details, **examined.details, **({"calibration": used} if used else {})})
        manifest = manifest.model_copy(update={"details": details})
        with step(f"building for {lowered.device}"):
            built = chosen.build(folder, manifest, required=False)
        if built is not None:  # before the stages, which execute what was built
            manifest = manifest.model_copy(
                update={"device": built.device or manifest.device, "details": {**details, **json_values(built.details)}}
            )
            notes += built.notes
        drawn: Samples | None = None
        for stage in chosen.stages(folder, manifest):
            if built is not None and stage.name == "device":
                stages.append(built.stage)
            with step(f"verifying the artifact: {stage.name}"):
                result, samples = run_stage(
                    stage,
                    all_inputs,
                    all_outputs,
                    tolerance,
                    sampler=drawing,
                    pictures=pictures,
                    seed=seed,
                    sample_tolerance=SAMPLE_TOLERANCES.get(precision),
                )
                stages.append(result)
                drawn = samples or drawn
        if built is not None and built.stage not in stages:
            stages.append(built.stage)
        manifest = manifest.model_copy(update={"stages": tuple(stages), "verdict": weakest(stages)})
        with step("writing the report"):
            write_report(
                folder,
                manifest,
                pictures=Pictures(pictures, drawn) if pictures and drawn else None,
                facts={
                    "notes": [*lowered.notes, *examined.notes, *notes],
                    "warnings": warnings,
                    "tables": [*lowered.tables, *examined.tables, *observed_table],
                },
            )
            manifest = bundles.write_manifest(folder, manifest)
    result_ = ExportResult(destination, manifest, warnings)
    if result_.exit_code:
        raise AccuracyError(
            f"{destination} was written, and its accuracy check failed",
            reasons=misses(manifest.stages),
            hint=f"see {destination / 'report.html'}; a looser bound is given with --atol, --rtol or --min-psnr",
            result=result_,
        )
    return result_


def _tensor_infos(cases: CaseArrays, shapes: Sequence[tuple[int | str, ...]]) -> tuple[TensorInfo, ...]:
    infos = []
    for (name, example), shape in zip(cases["example"].items(), shapes, strict=True):
        seen = [a for arrays in cases.values() if (a := arrays[name]).size and a.dtype != np.bool_]
        infos.append(
            TensorInfo(
                name=name,
                dtype=str(example.dtype),
                shape=shape,
                range=(min(float(a.min()) for a in seen), max(float(a.max()) for a in seen)) if seen else None,
            )
        )
    return tuple(infos)
