"""Finds the modules that can compute in a low precision under a budget of accuracy, and writes them as a recipe. Part of the Python API,
see `pipeline`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.calibrating import Run, draw_data, read_data, readers, rounded_job, sampler_of, smoothed_job, warnings_of
from isthmus.calibration.calibrator import CALIBRATORS
from isthmus.calibration.data import RANDOM, CalibrationData, check_preprocess, check_size
from isthmus.calibration.executors import executor
from isthmus.calibration.journal import Journal
from isthmus.calibration.metrics import compare
from isthmus.calibration.observe import Observer
from isthmus.calibration.perceptual import LARGEST, lpips_style, network, normalised_features
from isthmus.calibration.recipe import Recipe, patterns_of
from isthmus.calibration.sensitivity import Unit, all_flops, units_of
from isthmus.calibration.switches import switched
from isthmus.calibration.table import calibration_table
from isthmus.calibration.trials import MODEL, Trials, fingerprint, sqnr_db, write_facts
from isthmus.calibration.tuning import SEARCH_TRIALS, Budget, Found, Tell, Trialing, dominates, front_of, point_value, search
from isthmus.calibration.verify import module_runner, to_array
from isthmus.calibration.workplace import workplace
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.destination import write_whole
from isthmus.exporter.errors import Reason, UnknownNameError, UnsupportedError, UsageError
from isthmus.exporter.grids import ACTIVATION_GRIDS, WEIGHT_GRIDS
from isthmus.exporter.ops.native.torch_hook import native_kernels
from isthmus.exporter.passes import optimise
from isthmus.exporter.passes.fp8_layers import Layer
from isthmus.exporter.paths import StrPath
from isthmus.exporter.preprocess import parse_preprocess
from isthmus.exporter.source import Model, Source, load_source
from isthmus.exporter.spec import Dynamic, Sampler
from isthmus.exporter.target import TARGETS, Job
from isthmus.exporter.trace import dimension_names, trace
from isthmus.results import Progress, Silent, tool_versions

TARGET: Mapping[str, str] = {"fp8": "tensorrt", "int8": "onnxruntime"}
"""The target that a precision is tuned for, when none is named."""

HELD_OUT = 8
"""Sets of inputs that trials run on, where they are drawn and `held_out` does not say. No range is taken from them."""

_UNIFORM = ("max", "nearest")
"""The calibrator and the rounding that every search is compared with."""

LARGEST_PSNR = 300.0
"""What equal pictures have, dB."""


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Attributes:
        path: The recipe's file.
        recipe: What is in it.
        value: What the file beside it says: the points, the front of Pareto, and what uniform quantisation gives, as JSON values.
        warnings: What people have to know.
        trials: How many there were.
        known: How many of them an earlier call had run.
    """

    path: Path
    recipe: Recipe
    value: Mapping[str, Any]
    warnings: tuple[str, ...]
    trials: int
    known: int

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "path": str(self.path),
            "pareto": str(beside(self.path, "pareto.json")),
            "recipe": dataclasses.asdict(self.recipe),
            **{k: v for k, v in self.value.items() if k not in ("points", "modules")},
            "trials": self.trials,
            "known": self.known,
            "warnings": list(self.warnings),
            "exit_code": 0,
        }


def beside(output: Path, ending: str) -> Path:
    """The file `recipe.ENDING` beside `recipe.yaml`."""
    return output.with_name(f"{output.stem}.{ending}")


def tune(
    model: Model,
    output: StrPath,
    *,
    precision: str,
    min_sqnr: float | None = None,
    min_psnr: float | None = None,
    max_lpips: float | None = None,
    target: str | None = None,
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
    weight_rounding: str | None = None,
    smooth: float | None = None,
    held_out: int | None = None,
    jobs: int = 1,
    executor_name: str = "local",
    address: str = "",
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> TuneResult:
    """Searches for the recipe that has the most operations in a low precision and keeps a budget of accuracy.

    Trials run on the float32 graph in ONNX Runtime, in which every module's quantisation can be switched on, over inputs that no range was
    taken from. See `calibration.tuning.search`. What trials find is kept in `STEM.journal.jsonl` beside the output: a call that was killed,
    or one with another budget, runs the trials that are missing. The points of the search are written to `STEM.pareto.json`.

    Args:
        model: See `pipeline.export`, as for all that is not named here.
        output: The recipe's file, YAML; written whole or not at all.
        precision: `fp8` or `int8`.
        min_sqnr: The least SQNR of the worst output over the held-out inputs, against float32, dB.
        min_psnr: The least PSNR of the pictures at the end of the sampler, against float32, dB.
        max_lpips: The largest mean LPIPS-style distance of these pictures; see `calibration.perceptual`. One of the three bounds is needed.
        target: By default that of `TARGET`.
        opset: ONNX opset of the graph.
        batch_size: See `pipeline.export`.
        settings: See there.
        weights: See there.
        inputs: See there.
        dynamic: See there.
        calibration_data: See there.
        calibration_size: See there.
        calibration_method: See there; by default all are tried with every module quantised, and the one with the highest SQNR is taken.
        calibration_preprocess: See there.
        weight_rounding: See there; by default both are tried.
        smooth: See there; not tried by itself.
        held_out: Number of sets that are held out; by default `HELD_OUT` where they are drawn, and every fourth of those that are given.
        jobs: Processes that run trials on this machine.
        executor_name: `local` or `ray`.
        address: The address of a Ray cluster.
        seed: See `pipeline.export`.
        force: Replace a recipe that exists.
        progress: Told of every step.
        tell: Told of every trial.

    Raises:
        UsageError: An argument is wrong, or the data does not fit the model.
        UnsupportedError: The target cannot take the model, or nothing of it can be quantised.
        MachineError: ONNX Runtime or Ray is missing, or, for `max_lpips`, the weights of the network.
        IsthmusError: No module fits into the budget, or something failed.
    """
    output = Path(output)
    step = (progress or Silent()).step
    if precision not in TARGET:
        raise UnknownNameError("precision to tune for", precision, list(TARGET))
    chosen = TARGETS[target or TARGET[precision]]()
    if precision not in chosen.calibrated or f"{precision}_include" not in chosen.Options.model_fields:
        raise UsageError(f"{chosen.name} cannot be told which modules compute in {precision}", hint=f"choose --target {TARGET[precision]}")
    if min_sqnr is None and min_psnr is None and max_lpips is None:
        raise UsageError("a budget of accuracy is missing", hint="for example --min-sqnr 28")
    if output.exists() and not (force and output.is_file()):
        raise UsageError(f"the output {output} exists", hint="give --force to replace a file, or another -o")
    if weight_rounding not in (None, "nearest", "gptq"):
        raise UnknownNameError("weight rounding", str(weight_rounding), ["nearest", "gptq"])
    if smooth is not None and not 0 <= smooth <= 1:
        raise UsageError(f"smooth: got {smooth}, expected a number from 0 to 1")
    opset = chosen.opsets[0] if opset is None else opset
    if opset not in chosen.opsets:
        raise UnknownNameError("opset", str(opset), [str(known) for known in chosen.opsets])
    methods = (
        [CALIBRATORS.entry(calibration_method).name] if calibration_method else sorted(CALIBRATORS, key=lambda name: (name != "max", name))
    )
    check_size(calibration_size)
    check_size(held_out)
    preprocess = parse_preprocess(calibration_preprocess) if calibration_preprocess is not None else None
    check_preprocess(calibration_data, preprocess)
    if max_lpips is not None:
        network()

    with executor(executor_name, jobs=jobs, address=address) as running, workplace(output) as graphs:
        with step("building the model"):
            source = load_source(
                model, settings=settings or {}, weights=weights, inputs=inputs, dynamic=dynamic, batch_size=batch_size, seed=seed
            )
            given = read_data(source, calibration_data, seed=seed, size=calibration_size, preprocess=preprocess)
        sampler = sampler_of(source)
        drawn_bounds = [name for name, bound in (("--min-psnr", min_psnr), ("--max-lpips", max_lpips)) if bound is not None]
        if drawn_bounds and sampler is None:
            raise UsageError(
                f"{' and '.join(drawn_bounds)}: for models that draw pictures with trained weights, and {source.name} does not",
                hint="give --min-sqnr",
            )
        with step("running PyTorch"), native_kernels(False):
            run = module_runner(source.module, source.example, source.spec.outputs if source.spec else None)
            results = run({name: to_array(tensor) for name, tensor in source.example.items()})
            outputs = tuple(results)
            _check_measurable(source.name, results)
            data, held = _split(source, run, given, seed=seed, size=calibration_size, held_out=held_out)
        with step("translating to ONNX"):
            program = trace(source.module, source.example, dynamic=source.dynamic, ranges=source.ranges)
            names = dimension_names(program, source.dynamic, source.example)
            graph = optimise(
                onnx_files.to_onnx(program, opset=opset, input_names=list(source.example), output_names=outputs, dimension_names=names)
            )
        job: Job[Any] = Job(
            program=program,
            model=graph,
            precision=precision,
            options=chosen.Options.model_validate({f"{precision}_include": ("*",)}),
            input_names=tuple(source.example),
            output_names=outputs,
            sizes=source.ranges,
        )
        if reasons := chosen.unsupported(job):
            raise UnsupportedError(f"{chosen.name} does not support {source.name} in {precision}", reasons=reasons)
        usual = {layer.node for layer in chosen.quantised(dataclasses.replace(job, options=chosen.Options()))}
        with step("calibrating"):
            job, notes = smoothed_job(job, chosen.observed(job), data, smooth)
            layers = chosen.quantised(job)
            sizes = {name: size.opt for name, size in source.ranges.items()}
            units = units_of(job.onnx, layers, sizes)
            if not units:
                raise UnsupportedError(f"no module of {source.name} can compute in {precision}")
            preparing = _Preparing(graphs, job, source, data, held, chosen.observed(job), layers, units, seed)
        trialing = Trialing(running, Journal(beside(output, "journal.jsonl")), tell)
        of_pictures = bool(drawn_bounds) + (max_lpips is not None)  # figures of the pictures of every module alone
        trialing.expected = 1 + 2 * len(methods) + (1 + of_pictures) * len(units) + SEARCH_TRIALS
        with step("choosing how ranges and weights are found"):
            uniform, setting, best = _choose(preparing, trialing, methods, weight_rounding)
        with step(f"measuring {len(units)} modules"):
            pictures = _Pictures(sampler, best.folder, seed) if sampler is not None else None

            def psnr(on: frozenset[int]) -> float:
                assert pictures is not None
                return trialing.value(f"psnr {seed}", best.fingerprint, on, lambda: pictures.psnr(on))

            def lpips(on: frozenset[int]) -> float:
                assert pictures is not None
                return trialing.value(f"lpips-style {seed}", best.fingerprint, on, lambda: pictures.lpips(on))

            total = all_flops(job.onnx, sizes)
            default = frozenset(i for i, unit in enumerate(units) if all(layer.node in usual for layer in unit.layers))
            found = search(
                units,
                total,
                Budget(min_sqnr, min_psnr, max_lpips),
                noises=lambda choices: trialing.noises(best.folder, best.fingerprint, choices),
                psnr=psnr if pictures is not None else None,
                lpips=lpips if pictures is not None else None,
                also=[on for on in (default, frozenset(range(len(units)))) if on],
            )
            if pictures is not None and found.best.psnr_db is None:
                found = _with_pictures(found, psnr(found.best.on))
    low = [unit.module for i, unit in enumerate(units) if i in found.best.on]
    rest = [unit.module for i, unit in enumerate(units) if i not in found.best.on]
    recipe = Recipe(precision, patterns_of(low, rest), patterns_of(rest, low), *setting, smooth)
    all_on = sum(unit.flops for unit in units) / total if total else 0.0
    value = {
        "schema": 1,
        "model": source.name,
        "weights": source.weights.sha256,
        "target": chosen.name,
        "precision": precision,
        "recipe": recipe.sha256(),
        "budget": {"min_sqnr_db": min_sqnr, "min_psnr_db": min_psnr, "max_lpips_style": max_lpips},
        "calibration": {"method": setting[0], "weight_rounding": setting[1], "smooth": smooth, **data.summary()},
        "held_out": held.summary(),
        "chosen": point_value(found.best, units),
        "predicted_sqnr_db": found.predicted_sqnr_db,
        "uniform": {"calibration_method": _UNIFORM[0], "weight_rounding": _UNIFORM[1], "flop_share": all_on, "sqnr_db": uniform},
        "dominates_uniform": dominates(found.points, all_on, uniform),
        "front": [point_value(point, units) for point in front_of(found.points)],
        "points": [point_value(point, units) for point in found.points],
        "modules": [
            {
                "module": units[i].module,
                "flops": units[i].flops,
                "sqnr_db": found.alone[i].sqnr_db,
                "psnr_db": found.alone[i].psnr_db,
                "lpips_style": found.alone[i].lpips_style,
                "chosen": i in found.best.on,
            }
            for i in found.order
        ],
    }
    drawn = f", PSNR of the pictures {found.best.psnr_db:.2f} dB" if found.best.psnr_db is not None else ""
    drawn += f", their LPIPS-style distance {found.best.lpips_style:.3g}" if found.best.lpips_style is not None else ""
    sentence = f"{found.best.share:.1%} of the operations of matrix products in {precision}: SQNR {found.best.sqnr_db:.2f} dB{drawn}"
    write_whole(beside(output, "pareto.json"), json.dumps(value, indent=2, allow_nan=False) + "\n")
    write_whole(output, recipe.text(notes=[f"{source.name} for {chosen.name}, by isthmus tune", sentence, *notes]))
    warnings = [*warnings_of(data), *(["No set of inputs is held out: there is only one."] if held is data else [])]
    return TuneResult(output, recipe, value, tuple(warnings), trialing.done, trialing.known)


@dataclass(frozen=True)
class _Prepared:
    """A folder of trials."""

    folder: Path
    fingerprint: str


class _Preparing:
    """Writes a folder of trials for a way to find ranges and weights."""

    def __init__(
        self,
        folder: Path,
        job: Job[Any],
        source: Source,
        data: CalibrationData,
        held: CalibrationData,
        observed: Sequence[str],
        layers: Sequence[Layer],
        units: Sequence[Unit],
        seed: int,
    ) -> None:
        self._folder, self._job, self._source, self._data, self._held = folder, job, source, data, held
        self._observed, self._layers, self._seed = observed, layers, seed
        self.units = units
        self._observer = Observer(job.onnx, observed)
        self._seen = self._observer.observe(data)
        self._rounded: Job[Any] | None = None

    def prepare(self, method: str, rounding: str) -> _Prepared:
        """The folder for a calibrator and a way to round weights."""
        precision = self._job.precision
        table = calibration_table(
            self._seen,
            self._data,
            method=method,
            grids=ACTIVATION_GRIDS[precision],
            model=self._source.name,
            weights=self._source.weights.sha256,
            seed=self._seed,
            modules=readers(self._job.onnx, self._observed),
        )
        job = self._job
        if rounding == "gptq":
            if self._rounded is None:
                self._rounded = rounded_job(job, self._layers, self._observer, self._data, WEIGHT_GRIDS[precision])
            job = self._rounded
        switches = [(layer, index) for index, unit in enumerate(self.units) for layer in unit.layers]
        model = switched(job.onnx, switches, table, precision, weights=job.weights, corrections=job.corrections)
        folder = self._folder / f"{method}-{rounding}"
        folder.mkdir(parents=True)
        size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        onnx_files.save(model, folder / MODEL, bytes_of_weights=size)
        write_facts(folder, switches=len(self.units), outputs=job.output_names, sets=self._held.sets)
        return _Prepared(folder, fingerprint(folder, precision, tool_versions().get("isthmus", "")))


def _choose(
    preparing: _Preparing, trialing: Trialing, methods: Sequence[str], rounding: str | None
) -> tuple[float, tuple[str, str], _Prepared]:
    """Measures every way to find ranges and weights, with every module quantised.

    Returns:
        The SQNR of ranges of the largest values and weights rounded to nearest, dB; the calibrator and the rounding with the highest SQNR,
        the first where several have it; and its folder.
    """
    everything = frozenset(range(len(preparing.units)))
    allowed = [(method, way) for method in methods for way in ((rounding,) if rounding else ("nearest", "gptq"))]
    uniform = 0.0
    best: tuple[float, tuple[str, str], _Prepared] | None = None
    for setting in dict.fromkeys([_UNIFORM, *allowed]):
        prepared = preparing.prepare(*setting)
        (noise,) = trialing.noises(prepared.folder, prepared.fingerprint, [everything])
        found = sqnr_db(noise)
        if setting == _UNIFORM:
            uniform = found
        dropped: _Prepared | None = prepared
        if setting in allowed and (best is None or found > best[0]):
            dropped = best[2] if best is not None else None
            best = (found, setting, prepared)
        if dropped is not None:  # each holds the weights
            shutil.rmtree(dropped.folder)
    assert best is not None
    return uniform, best[1], best[2]


class _Pictures:
    """Pictures that the graph draws, with and without quantisation."""

    def __init__(self, sampler: Sampler, folder: Path, seed: int) -> None:
        self._sampler, self._folder, self._seed = sampler, folder, seed
        self._trials: Trials | None = None
        self._reference: np.ndarray[Any, Any] | None = None
        self._features: list[list[torch.Tensor]] | None = None
        self._last: tuple[frozenset[int], np.ndarray[Any, Any]] | None = None

    def psnr(self, on: frozenset[int]) -> float:
        """The PSNR of the pictures with some switches on, dB."""
        reference, candidate = self._pair(on)
        found = compare(reference, candidate, case="samples", output="images").psnr_db
        return float(np.clip(np.nan_to_num(found, nan=-LARGEST_PSNR), -LARGEST_PSNR, LARGEST_PSNR))

    def lpips(self, on: frozenset[int]) -> float:
        """The mean LPIPS-style distance of the pictures with some switches on; the largest that there is for pictures that are broken."""
        reference, candidate = self._pair(on)
        if self._features is None:
            self._features = normalised_features(reference)
        return float(np.nan_to_num(np.mean(lpips_style(reference, candidate, features=self._features)), nan=LARGEST))

    def _pair(self, on: frozenset[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The pictures without quantisation, and with it. The last ones are kept: two measures of one choice draw once."""
        if self._trials is None:
            self._trials = Trials(self._folder)
        if self._reference is None:
            self._reference = self._draw(self._trials, frozenset())
        if self._last is None or self._last[0] != on:
            self._last = on, self._draw(self._trials, on)
        return self._reference, self._last[1]

    def _draw(self, trials: Trials, on: frozenset[int]) -> np.ndarray[Any, Any]:
        return self._sampler(lambda inputs: trials.run(inputs, on), np.random.Generator(np.random.PCG64(self._seed))).images


def _with_pictures(found: Found, psnr: float) -> Found:
    best = dataclasses.replace(found.best, psnr_db=psnr)
    return dataclasses.replace(found, best=best, points=tuple(best if p.on == best.on else p for p in found.points))


def _check_measurable(name: str, results: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Refuses a model without an output whose error has an energy.

    Raises:
        UsageError: No output holds floating-point numbers; all are listed.
    """
    if any(array.dtype.kind == "f" and array.size for array in results.values()):
        return
    raise UsageError(
        f"a search measures the error of floating-point outputs, and those of {name} are all of other types",
        reasons=[Reason(f"has dtype {array.dtype} and shape {array.shape}", where=output) for output, array in results.items()],
        hint="give a module:callable whose module returns what these are made from, such as the scores before argmax",
    )


def _split(
    source: Source, run: Run, given: CalibrationData | None, *, seed: int, size: int | None, held_out: int | None
) -> tuple[CalibrationData, CalibrationData]:
    """The inputs that ranges are taken from, and those that trials run on: drawn with another seed, or some of those that are given.

    Raises:
        UsageError: More are to be held out than are given; one has to be left for the ranges.
    """
    other, drawn_size = (seed + 1) % 2**63, held_out or HELD_OUT
    if given is None:
        return draw_data(source, run, seed=seed, size=size), draw_data(source, run, seed=other, size=drawn_size)
    if given.source == RANDOM:
        drawn = read_data(source, RANDOM, seed=other, size=drawn_size)
        assert drawn is not None
        return given, drawn
    count = len(given.sets)
    if held_out is not None and held_out >= count:
        raise UsageError(
            f"--held-out: got {held_out}, and {given.source} gives {count} set{'s' if count > 1 else ''}, one of which ranges need",
            hint="give more sets, and a --held-out below their number",
        )
    if count == 1:
        return given, given
    # Evenly spread, the last one among them: neighbours in a file are often alike.
    chosen = {(i + 1) * count // held_out - 1 for i in range(held_out)} if held_out is not None else {*range(3, count, 4)}
    held = chosen or {count - 1}
    kept = [arrays for i, arrays in enumerate(given.sets) if i not in held]
    return dataclasses.replace(given, sets=kept), dataclasses.replace(given, sets=[given.sets[i] for i in sorted(held)])
