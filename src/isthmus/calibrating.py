"""Where an export's calibration inputs come from, and the command that observes ranges without exporting. Part of the Python API, see
`pipeline`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from isthmus.calibration.batches import InBatches
from isthmus.calibration.calibrator import CALIBRATORS
from isthmus.calibration.cases import draw_inputs
from isthmus.calibration.data import RANDOM, CalibrationData, check_preprocess, check_size, given_data, trajectory_data
from isthmus.calibration.observe import Observer
from isthmus.calibration.statistics import Gathering, peaks
from isthmus.calibration.table import calibration_table
from isthmus.calibration.verify import module_runner, to_array
from isthmus.calibration.weights import gptq_weights, scaled_weights
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.destination import write_whole
from isthmus.exporter.errors import Reason, UnknownNameError, UnsupportedError, UsageError
from isthmus.exporter.grids import ACTIVATION_GRIDS, WeightGrid
from isthmus.exporter.ops.native.torch_hook import native_kernels
from isthmus.exporter.passes import module_of, optimise
from isthmus.exporter.passes._rewrite import constant_tensor, is_op
from isthmus.exporter.passes.fp8_layers import Layer
from isthmus.exporter.passes.layer_values import layer_values
from isthmus.exporter.passes.smooth_activations import SmoothActivations
from isthmus.exporter.paths import StrPath
from isthmus.exporter.preprocess import Preprocess, parse_preprocess
from isthmus.exporter.ranges import CalibrationTable, DataInfo
from isthmus.exporter.sampling import GraphSampler
from isthmus.exporter.source import Model, Source, load_source
from isthmus.exporter.spec import Dynamic, Sampler
from isthmus.exporter.target import Job, Target
from isthmus.exporter.trace import dimension_names, trace
from isthmus.results import Progress, Silent

Arrays = dict[str, np.ndarray[Any, Any]]
Run = Callable[[Mapping[str, np.ndarray[Any, Any]]], Mapping[str, np.ndarray[Any, Any]]]

ROUNDINGS = ("nearest", "gptq")
"""What `--weight-rounding` takes, the default first."""

RANDOM_WARNING = (
    "Calibrated on random inputs, as was asked for: the ranges say nothing of real inputs, which may saturate. "
    "Calibrate on real data before use."
)


@dataclass(frozen=True)
class CalibrateResult:
    """What a calibration found.

    Attributes:
        path: The table's file.
        table: What is in it.
    """

    path: Path
    table: CalibrationTable

    @property
    def warnings(self) -> tuple[str, ...]:
        """What people have to know before they use it."""
        return (RANDOM_WARNING,) if self.table.random else ()

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        drifts = {name: seen.drift for name, seen in self.table.values.items() if seen.drift is not None}
        return {
            "path": str(self.path),
            "model": self.table.model,
            **self.table.summary(),
            "values": len(self.table.values),
            "largest_drift": max(drifts.values(), default=None),
            "warnings": list(self.warnings),
            "exit_code": 0,
        }


def calibrate(
    model: Model,
    output: StrPath,
    *,
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
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> CalibrateResult:
    """Observes the ranges of a model's activations, for every precision that needs them, and writes them as a calibration table.

    Observed is what matrix products and attention read, and what those with a weight compute. The file is written whole or not at all.

    Args:
        model: See `pipeline.export`, as for all that is not named here.
        output: The file.
        opset: ONNX opset of the graph whose values are named.
        batch_size: See `pipeline.export`.
        settings: See there.
        weights: See there.
        inputs: See there.
        dynamic: See there.
        calibration_data: See there.
        calibration_size: See there.
        calibration_method: See there.
        calibration_preprocess: See there.
        seed: See there.
        force: Replace a file that exists.
        progress: Told of every step.

    Raises:
        UsageError: An argument is wrong, or the data does not fit the model.
        UnsupportedError: No matrix product reads an activation.
        MachineError: ONNX Runtime is not installed.
        IsthmusError: Something failed.
    """
    output = Path(output)
    step = (progress or Silent()).step
    if output.exists() and not (force and output.is_file()):
        raise UsageError(f"the output {output} exists", hint="give --force to replace a file, or another -o")
    opset = onnx_files.OPSETS[0] if opset is None else opset
    if opset not in onnx_files.OPSETS:
        raise UnknownNameError("opset", str(opset), [str(known) for known in onnx_files.OPSETS])
    method = CALIBRATORS.entry(calibration_method or "max").name
    check_size(calibration_size)
    preprocess = parse_preprocess(calibration_preprocess) if calibration_preprocess is not None else None
    check_preprocess(calibration_data, preprocess)
    with step("building the model"):
        source = load_source(
            model, settings=settings or {}, weights=weights, inputs=inputs, dynamic=dynamic, batch_size=batch_size, seed=seed
        )
        data = read_data(source, calibration_data, seed=seed, size=calibration_size, preprocess=preprocess)
    with step("running PyTorch"), native_kernels(False):
        run = module_runner(source.module, source.example, source.spec.outputs if source.spec else None)
        outputs = tuple(run({name: to_array(tensor) for name, tensor in source.example.items()}))
        if data is None:
            data = draw_data(source, run, seed=seed, size=calibration_size)
    with step("translating to ONNX"):
        program = trace(source.module, source.example, dynamic=source.dynamic, ranges=source.ranges)
        names = dimension_names(program, source.dynamic, source.example)
        graph = optimise(
            onnx_files.to_onnx(program, opset=opset, input_names=list(source.example), output_names=outputs, dimension_names=names)
        )
    if not operands(graph):
        raise UnsupportedError(f"no matrix product of {source.name} reads an activation", hint="there is nothing to calibrate")
    observed = tuple(dict.fromkeys((*operands(graph), *(name for layer in layer_values(graph) for name in (layer.product, layer.result)))))
    with step("calibrating"):
        table = calibration_table(
            Observer(graph, observed).observe(data),
            data,
            method=method,
            grids=tuple(dict.fromkeys(grid for grids in ACTIVATION_GRIDS.values() for grid in grids)),
            model=source.name,
            weights=source.weights.sha256,
            seed=seed,
            modules=readers(graph, observed),
        )
    write_whole(output, table.json_text())
    return CalibrateResult(output, table)


def operands(model: ir.Model) -> tuple[str, ...]:
    """The names of all float32 activations that the main graph's matrix products and attentions read, in order, each once."""
    return tuple(
        dict.fromkeys(
            value.name
            for node in model.graph
            if is_op(node, "MatMul", "Gemm", "Conv", "ConvTranspose", "Attention")
            for value in node.inputs[: 3 if node.op_type == "Attention" else 2]
            if value is not None and value.name and value.dtype == ir.DataType.FLOAT and constant_tensor(value) is None
        )
    )


def readers(model: ir.Model, names: Sequence[str]) -> dict[str, str]:
    """The PyTorch module of the first node that reads each value; of the one that computes it, where that is none."""
    found: dict[str, str] = {}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name is not None:
                found.setdefault(value.name, module_of(node))
    for node in model.graph:
        for value in node.outputs:
            if value.name is not None and not found.get(value.name):
                found[value.name] = module_of(node)
    return {name: found[name] for name in names if name in found}


def smoothed_job(job: Job[Any], names: Sequence[str], data: CalibrationData | None, alpha: float | None) -> tuple[Job[Any], list[str]]:
    """The job with outlier channels of the named activations smoothed (`passes.smooth_activations`), and a sentence for the report.

    Args:
        job: The job; its graph is not changed.
        names: The activations that are quantised.
        data: The calibration data.
        alpha: SmoothQuant's; None to leave the job as it is.

    Raises:
        IsthmusError: The graph fails on the data.
    """
    if alpha is None or data is None or not names:
        return job, []
    seen = peaks(Observer(job.onnx, names), data.sets, names)
    model = job.onnx.clone()
    smooth = SmoothActivations(seen, alpha=alpha)
    smooth(model)
    note = f"{len(smooth.smoothed)} of {len(names)} activations are smoothed with alpha {alpha:g}; the others cannot be, or need not"
    return dataclasses.replace(job, model=model), [note]


def rounded_job(
    job: Job[Any],
    layers: Sequence[Layer],
    observer: Observer,
    data: CalibrationData,
    grid: WeightGrid,
    gathered: Gathering | None = None,
    scales: str = "max",
) -> Job[Any]:
    """The job with the weights of layers rounded by GPTQ, and the mean error that is left corrected; see `calibration.weights`.

    In E4M3 it is not corrected: the mean error of rounding floats is small beside the rest (docs/calibration.md, "Scales of weights").
    """
    weights, added = gptq_weights(job.onnx, layers, observer, data.sets, grid, scales=scales, gathered=gathered)
    return dataclasses.replace(job, weights=weights, corrections={} if grid == "e4m3" else added)


def scaled_job(job: Job[Any], layers: Sequence[Layer], grid: WeightGrid, scales: str) -> Job[Any]:
    """The job with the weights of layers rounded to nearest on scales that a calibrator chooses; see `calibration.weights`."""
    return dataclasses.replace(job, weights=scaled_weights(job.onnx, layers, grid, scales))


def calibrates(
    target: Target[Any],
    precision: str,
    *,
    data: str | None,
    size: int | None,
    method: str | None,
    preprocess: str | None,
    table: StrPath | None,
    rounding: str | None,
    scales: str | None,
    smooth: float | None,
) -> bool:
    """Whether an export needs calibration data or a table. The arguments are those of `pipeline.export`, as they were given.

    Raises:
        UsageError: One of them has no use; all such are listed.
    """
    if smooth is not None and not 0 <= smooth <= 1:
        raise UsageError(f"smooth: got {smooth}, expected a number from 0 to 1")
    of_data = {"--calibration-data": data, "--calibration-size": size, "--calibration-preprocess": preprocess}
    of_ranges = {"--calibration-method": method, "--calibration-table": table, "--smooth": smooth}
    if precision in target.rounded:
        why = f"{precision} on {target.name} stores weights alone in few bits, and has no ranges of activations"
        _refuse(of_ranges, f"{target.name} in {precision} has no use for all of these", why)
        if rounding != "gptq":
            _refuse(of_data, f"{target.name} in {precision} has no use for calibration data", "only --weight-rounding gptq reads it")
        return rounding == "gptq"
    if precision not in target.calibrated:
        choose = [*target.calibrated, *target.rounded]
        why = (
            f"leave it out, or choose --precision {' or '.join(choose)}" if choose else "leave it out: no precision of this target has one"
        )
        _refuse(
            {**of_data, **of_ranges, "--weight-rounding": rounding, "--weight-scales": scales},
            f"{target.name} in {precision} is not calibrated, and has no use for all of these",
            why,
        )
        return False
    if not target.opsets:
        why = f"smoothing rewrites the ONNX graph, and {target.name} is lowered from the PyTorch program"
        _refuse({"--smooth": smooth}, f"{target.name} in {precision} cannot smooth activations", why)
    if table is not None:
        other = {**of_data, "--calibration-method": method}
        _refuse(other, "--calibration-table holds ranges that are chosen already", "leave it out, or the table")
        needs = {"--smooth": smooth, "--weight-rounding gptq": rounding if rounding == "gptq" else None}
        _refuse(needs, "--calibration-table holds ranges alone", "it needs the inputs: give --calibration-data in place of the table")
    return True


def _refuse(options: Mapping[str, object], message: str, why: str) -> None:
    if reasons := [Reason(why, where=name) for name, value in options.items() if value is not None]:
        raise UsageError(message, reasons=reasons)


def check_table(table: CalibrationTable, path: StrPath | None, source: Source) -> None:
    """Refuses a table of other weights than those that are exported.

    Raises:
        UsageError: It is one.
    """
    if table.weights and table.weights != source.weights.sha256:
        raise UsageError(
            f"{path} was observed on other weights: sha256 {table.weights[:12]}… of {table.model or 'a model'}, "
            f"got {source.weights.sha256[:12]}… of {source.name}",
            hint="calibrate the model that is exported, with the same --weights and --seed",
        )


def sampler_of(source: Source) -> Sampler | None:
    """The model's sampler, where its weights are trained ones and the artifact will take its batches."""
    sampler = source.spec.sampler if source.spec and source.weights.origin in ("shipped", "file") else None
    if sampler is None:
        return None
    if allowed := source.ranges.get("batch"):
        return sampler if allowed.min <= sampler.batch <= allowed.max else None
    rows = source.sizes.get("batch", 0)
    if rows == sampler.batch:
        return sampler
    assert source.spec is not None
    axes = {name: axis for name, sizes in source.spec.dynamic.items() for axis, size in sizes.items() if size == "batch"}
    return InBatches(sampler, rows, axes) if axes and rows and sampler.batch % rows == 0 else None


def read_data(
    source: Source, text: str | None, *, seed: int, size: int | None, preprocess: Preprocess | None = None
) -> CalibrationData | None:
    """The calibration inputs that a call names; None for the model's own trajectories. See `calibration.data.given_data`."""

    def draw(rng: np.random.Generator) -> Arrays:
        tensors = source.spec.inputs(rng, source.sizes) if source.spec else draw_inputs(dict(source.example), rng)
        return {name: to_array(tensor) for name, tensor in tensors.items()}

    # What the outputs are called is not needed here.
    run = module_runner(source.module, source.example)

    def tried(inputs: Mapping[str, np.ndarray[Any, Any]]) -> object:
        with native_kernels(False):
            return run(inputs)

    return given_data(
        text,
        example={name: to_array(tensor) for name, tensor in source.example.items()},
        dynamic=source.dynamic,
        sampler=sampler_of(source),
        draw=draw,
        seed=seed,
        size=size,
        timestep=_timestep(source),
        preprocess=preprocess,
        run=tried,
    )


def draw_data(source: Source, run: Run, *, seed: int, size: int | None) -> CalibrationData:
    """The calibration inputs that a model sees while it samples; see `calibration.data.trajectory_data`."""
    sampler = sampler_of(source)
    assert sampler is not None, "read_data refuses a model without one"
    example = {name: to_array(tensor) for name, tensor in source.example.items()}
    return trajectory_data(sampler, run, example=example, seed=seed, size=size, timestep=_timestep(source))


def warnings_of(data: CalibrationData | DataInfo | None) -> list[str]:
    """What people have to know of the data."""
    return [RANDOM_WARNING] if data is not None and data.source == RANDOM else []


def unquantised(target: Target[Any], job: Job[Any]) -> list[str]:
    """What people have to know of a model of which nothing is quantised, though its precision would: a warning, or none.

    Raises:
        UsageError: The options do not fit the model.
    """
    # What is lowered from the PyTorch program names as `quantised` what GPTQ can round, and no more.
    if not target.opsets or job.precision not in (*target.calibrated, *target.rounded) or target.quantised(job):
        return []
    can_include = f"{job.precision}_include" in target.Options.model_fields
    more = f" --{job.precision}-include '*' takes those that are left by default." if can_include else ""
    return [f"No layer is in {job.precision}: the artifact computes as it would without. The report says why each was left.{more}"]


def _timestep(source: Source) -> str:
    """The name of the input that holds the timestep; empty where that is not known."""
    sampler = source.spec.sampler if source.spec else None
    return sampler.loop().time if isinstance(sampler, GraphSampler) else ""
