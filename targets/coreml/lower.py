"""Writes the packages of a model: sizes, states, layout, conversion, compression, chunks, and what the report says of them."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...exporter.errors import IsthmusError, Reason
from ...exporter.manifest import Manifest
from ...exporter.memory import release
from ...exporter.passes.half_precision import overflowing
from ...exporter.passes.layer_values import LayerValues, layer_values
from ...exporter.quiet import quiet
from ...exporter.spec import Arrays
from ...exporter.target import Examined, Job, Lowered
from . import tables
from .convert import Converted, converted, decomposed, identifiers, user_inputs
from .interpreter import Interpreter, Observed, load, observe
from .interpreter.program import operations_in
from .modules import KEY, read_modules
from .options import CoreMLOptions
from .package import save, size
from .ranges import Calibrate, Calibration, calibration_of
from .session import Interface
from .states import State

if TYPE_CHECKING:
    from torch.export import ExportedProgram

MODEL = "model.mlpackage"
UNCOMPRESSED = ("fp16", "fp32")
MAIN = "main"
"""The function of a package that has one."""


def unsupported(job: Job[CoreMLOptions]) -> list[Reason]:
    """Every reason why a model cannot become a package with these options."""
    from . import compression, functions, layout, sizes, states, support

    options, target = job.options, job.options.minimum_deployment_target
    program = decomposed(job.program)
    reasons = sizes.unsupported(program, options.shapes, target)
    one = decomposed(sizes.fixed(job.program, sizes.chosen(job.program)[0])) if options.shapes == "functions" and not reasons else program
    reasons += support.unsupported(one, target)
    reasons += states.unsupported(program, job.input_names, job.output_names, options.states, target)
    reasons += _at_odds(options, job.precision)
    if changed := sorted(program.graph_signature.buffers_to_mutate.values()):
        what = "is a buffer that every call changes, so that no call can be measured by itself"
        reasons += [Reason(what, where=name, fix="make it an input and an output, and name it with --states") for name in changed]
    if options.shapes == "functions":
        reasons += functions.unsupported(target)
    if options.layout == "ane" or options.attention != "original":
        reasons += layout.unsupported(one)
    if job.precision not in UNCOMPRESSED:
        reasons += compression.unsupported(job.precision, target)
    return list(dict.fromkeys(reasons))


def lower(job: Job[CoreMLOptions], folder: Path) -> Lowered:
    """Writes `model.mlpackage`; with `--chunk-size` `model_1.mlpackage`, `model_2.mlpackage` and so on, where the model is larger than one.

    Raises:
        IsthmusError: The conversion fails.
        UnsupportedError: The model cannot be cut into chunks of that size.
        UsageError: A pattern of `--keep` fits no weight.
    """
    from . import functions, sizes

    options = job.options
    program, kept = _with_states(job)
    names = [name for name in job.input_names if name not in options.states]
    outputs = job.output_names[: len(job.output_names) - len(options.states)]
    made: dict[str, _Made] = {}
    shapes: dict[str, dict[str, list[int]]] = {}
    if options.shapes == "functions":
        for at in sizes.chosen(job.program):
            of = [shape for (shape,) in sizes.shapes(job.program, [at])]
            name = _function_name(names, of, user_inputs(job.program)) if made else MAIN
            made[name] = _make(job, decomposed(sizes.fixed(job.program, at)), names, outputs)
            shapes[name] = {key: list(shape) or [1] for key, shape in zip(identifiers(names), of, strict=True)}
    else:
        made[MAIN] = _make(job, program, names, outputs)
    facts = {
        "isthmus.precision": job.precision,
        "isthmus.compute_units": options.compute_units,
        KEY: made[MAIN].converted.modules,
    }
    description = f"Exported from PyTorch with isthmus, {job.precision}"
    paths = [folder / MODEL]
    if shapes:
        functions.save({name: m.converted.model for name, m in made.items()}, paths[0], default=MAIN, description=description, facts=facts)
    else:
        paths = _save(made[MAIN].converted.model, folder, options.chunk_size * 2**20, description, facts)
    return Lowered(
        device=f"Core ML, {options.minimum_deployment_target} and later",
        notes=tuple(_notes(options, kept, made[MAIN], paths)),
        details={
            **({"packages": [path.name for path in paths]} if len(paths) > 1 else {}),
            **({"functions": shapes} if shapes else {}),
            **_state_details(kept),
            **({"compression": made[MAIN].compressed} if made[MAIN].compressed else {}),
        },
        tables=tuple(tables.compression(made[MAIN].compressed)),
    )


def examine(packages: Sequence[Path], manifest: Manifest, example: Arrays) -> Examined:
    """What packages say themselves, as they are on the disk: operations, bytes, the share on the Neural Engine, and the room of float16.

    Args:
        packages: The `.mlpackage`s, each fed what those before it computed.
        manifest: Of the bundle; its details are those of `lower`.
        example: The inputs at which they are executed.

    Raises:
        IsthmusError: A package cannot be read.
    """
    written = _Written.read(packages)
    ranges = _observed(written, manifest, example)
    share = written.share(ranges)
    notes = []
    if manifest.precision != "fp32" and (count := written.float32_operations):
        notes.append(f"{count} operations compute in float32, off the Neural Engine; sines and cosines and their angles always do.")
    figures, found = written.figures, (*tables.engine(share), *tables.head_room(ranges, written.modules, manifest.precision))
    del written
    release(figures["weight_bytes"])  # of the programs, whose objects refer to each other, and which the stages read once more
    return Examined(notes=tuple(notes), details={**figures, "engine": share.value()}, tables=found)


def _at_odds(options: CoreMLOptions, precision: str) -> list[Reason]:
    """Options that contradict each other."""
    reasons = []
    if options.states and precision == "fp32":
        reasons.append(Reason("Core ML keeps states in float16, got fp32", where="--states", fix="--precision fp16, or leave them inputs"))
    if options.chunk_size and options.shapes != "fixed":
        what = f"a model is cut at fixed sizes, got --shapes {options.shapes}"
        reasons.append(Reason(what, where="--chunk-size", fix="--shapes fixed, or leave one of them out"))
    return reasons


@dataclass(frozen=True)
class _Made:
    """A program as Core ML has it, with what was done to get there."""

    converted: Converted
    compressed: list[dict[str, object]] = field(default_factory=list)
    wide: tuple[str, ...] = ()
    plain: tuple[Reason, ...] = ()
    """What `--layout ane` left as it was."""


def _with_states(job: Job[CoreMLOptions]) -> tuple[ExportedProgram, list[State]]:
    from . import states

    program = decomposed(job.program)
    if not job.options.states:
        return program, []
    return states.with_states(program, job.input_names, job.output_names, job.options.states)


def _make(job: Job[CoreMLOptions], program: ExportedProgram, names: Sequence[str], outputs: Sequence[str]) -> _Made:
    from . import compression, layout, sizes

    options = job.options
    listed = sizes.shapes(program, sizes.chosen(program)) if options.shapes == "enumerated" else []
    plain: tuple[Reason, ...] = ()
    if options.layout == "ane":
        program = layout.to_ane(program)
        plain = tuple(layout.left(program, split=options.attention == "split-einsum"))
    if options.attention == "split-einsum":
        program = layout.split_einsum(program)
    compute = "fp32" if job.precision == "fp32" else "fp16-wide-scans" if options.scan_precision == "fp32" else "fp16"
    wide = tuple(overflowing(job.peaks)) if compute != "fp32" else ()
    found = converted(
        program,
        compute,
        deployment_target=options.minimum_deployment_target,
        input_names=names,
        output_names=outputs,
        shapes=listed,
        wide=wide,
        masks_in_order=options.layout == "ane" or options.attention != "original",
    )
    if job.precision in UNCOMPRESSED:
        return _Made(found, wide=wide, plain=plain)
    model, done = compression.compress(found.model, job.precision, _calibrate(job, found.modules), keep=options.keep)
    return _Made(Converted(model, found.modules), done, wide, plain)


def calibrated_layers(job: Job[CoreMLOptions]) -> tuple[LayerValues, ...]:
    """The layers of the graph that a job is calibrated on, without those whose weights are too small to be compressed."""
    from .compression import MINIMUM

    sizes = {name: math.prod(value.shape.numpy()) for name, value in job.onnx.graph.initializers.items() if value.shape is not None}
    return tuple(layer for layer in layer_values(job.onnx) if sizes.get(layer.weight, MINIMUM) >= MINIMUM)


def _calibrate(job: Job[CoreMLOptions], modules: str) -> Calibrate | None:
    """What gives the calibration of a program that was converted; None where the job has none."""
    table = job.calibration
    if table is None:
        return None

    def calibrate(program: Any) -> Calibration:
        layers = layer_values(job.onnx)
        return calibration_of(program, read_modules({KEY: modules}), layers, table, weights=job.weights, corrections=job.corrections)

    return calibrate


def _save(model: Any, folder: Path, limit: int, description: str, facts: Mapping[str, str]) -> list[Path]:
    """Writes one package, or the chunks of a model whose weights are past the limit."""
    from . import chunks

    parts = [chunk.model for chunk in chunks.cut(model, limit)] if limit else [model]
    stem = Path(MODEL).stem
    paths = [folder / MODEL] if len(parts) == 1 else [folder / f"{stem}_{i}.mlpackage" for i in range(1, len(parts) + 1)]
    for i, (part, path) in enumerate(zip(parts, paths, strict=True), start=1):
        which = f"{description}, part {i} of {len(parts)}" if len(parts) > 1 else description
        save(part, path, description=which, facts=facts)
    return paths


@dataclass(frozen=True)
class _Written:
    """The packages as they are on the disk."""

    paths: Sequence[Path]
    programs: Sequence[Any]
    modules: Mapping[str, str]

    @staticmethod
    def read(paths: Sequence[Path]) -> _Written:
        with quiet("coremltools"):
            import coremltools as ct

            metadata = ct.models.utils.load_spec(str(paths[0])).description.metadata.userDefined
            return _Written(paths, [load(path) for path in paths], read_modules(metadata))

    @property
    def figures(self) -> dict[str, Any]:
        """For the manifest."""
        counts = collections.Counter(op.op_type for program in self.programs for op in operations(program) if op.op_type != "const")
        return {
            "operations": counts.total(),
            "float32_operations": self.float32_operations,
            "operators": dict(sorted(counts.items())),
            "weight_bytes": sum(self._weights(path) for path in self.paths),
            "file_bytes": sum(size(path) for path in self.paths),
        }

    @property
    def float32_operations(self) -> int:
        """How many operations compute in float32."""
        return sum(_is_wide(op) for program in self.programs for op in operations(program))

    @staticmethod
    def _weights(path: Path) -> int:
        return sum(file.stat().st_size for file in path.rglob("weight*.bin"))

    def share(self, ranges: Mapping[str, Observed]) -> Any:
        """What part of the program is likely on the Neural Engine; see `rules.engine`."""
        from .rules.engine import engine_share
        from .rules.program import Package, ProgramSubject

        packages = [
            Package(program, {file.relative_to(path).as_posix(): file.stat().st_size for file in path.rglob("*.bin")}, self.modules)
            for program, path in zip(self.programs, self.paths, strict=True)
        ]
        return engine_share(ProgramSubject(tuple(packages), target="coreml", peaks={name: seen.peak for name, seen in ranges.items()}))


def _is_wide(operation: Any) -> bool:
    """Whether an operation computes in float32; casts and weights compute nothing."""
    from coremltools.converters.mil.mil import types

    if operation.op_type == "cast" or operation.op_type.startswith("const"):
        return False
    return any(variable.dtype == types.fp32 for variable in operation.outputs)


def operations(program: Any) -> Iterator[Any]:
    """Every operation of every function of a program."""
    for function in program.functions.values():
        yield from operations_in(function)


def _observed(written: _Written, manifest: Manifest, example: Arrays) -> dict[str, Observed]:
    """The ranges of the values at the example, from states of zero; empty for what the interpreter cannot run, which its stage says."""
    values, _ = Interface.of(manifest).given(example)
    found: dict[str, Observed] = {}
    try:
        for program in written.programs:
            interpreter = Interpreter(program)
            read = {name: values[name] for name in interpreter.inputs}
            found |= observe(program, [read])
            if program is not written.programs[-1]:
                values |= interpreter.run(read)
    except IsthmusError:
        return {}
    return found


def _function_name(names: Sequence[str], shapes: Sequence[tuple[int, ...]], values: Sequence[tuple[str, Any]]) -> str:
    """A name for a function of fixed sizes: the shapes of the inputs that vary."""
    varying = [
        f"{name}_{'x'.join(map(str, shape))}"
        for name, shape, (_, value) in zip(identifiers(names), shapes, values, strict=True)
        if not all(isinstance(size, int) for size in value.shape)
    ]
    return "_".join(varying)


def _state_details(kept: Sequence[State]) -> dict[str, object]:
    if not kept:
        return {}
    return {
        "states": [{"name": state.name, "dtype": "float16", "shape": list(state.shape)} for state in kept],
        "state_outputs": {state.name: state.output for state in kept},
    }


def _notes(options: CoreMLOptions, kept: Sequence[State], made: _Made, paths: Sequence[Path]) -> Iterator[str]:
    if made.wide:
        some = ", ".join(path or "the model itself" for path in made.wide[:4])
        yield f"{len(made.wide)} modules leave float16's range and compute in float32: {some}."
    if made.plain:
        yield f"{len(made.plain)} operations have no form in the layout of the Neural Engine: {'; '.join(map(str, made.plain[:4]))}."
    if kept:
        yield f"States that Core ML keeps in float16, zero at first: {', '.join(state.name for state in kept)}."
    if len(paths) > 1:
        yield f"Cut into {len(paths)} packages, which run one after the other: {', '.join(path.name for path in paths)}."
    if options.shapes == "functions":
        yield "One function for each list of sizes; an application chooses one by its name when it loads the package."
