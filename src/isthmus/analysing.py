"""What of a model's behaviour survives in a bundle's artifact: `isthmus verify --analysis`. Part of the Python API, see `pipeline`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.calibration.analysis import ANALYSES, Finding, Run, Seen, findings
from isthmus.calibration.analysis_report import FILE, AnalysisReport, report_of
from isthmus.calibration.report import HTML, render
from isthmus.calibration.verify import module_runner, to_array
from isthmus.differences import open_bundle, rebuild
from isthmus.exporter import bundle as bundles
from isthmus.exporter.errors import AccuracyError, IsthmusError, MachineError, Reason, UsageError
from isthmus.exporter.manifest import Manifest
from isthmus.exporter.ops.native.torch_hook import native_kernels
from isthmus.exporter.paths import StrPath
from isthmus.exporter.source import Source
from isthmus.exporter.spec import Analysis, Arrays
from isthmus.exporter.target import Stage
from isthmus.results import Progress, Silent

ALL = "all"
"""What stands for every analysis that suits the model."""

ROWS = 256
"""How many rows are drawn by default."""

MAX_BYTES = 4 * 2**30
"""Of the inputs of all rows, and of the outputs of both sides, which are held at once."""


@dataclass(frozen=True)
class AnalysisResult:
    """What the analyses found.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        report: What was found.
    """

    bundle: Path
    manifest: Manifest
    report: AnalysisReport

    @property
    def exit_code(self) -> int:
        """3 when a figure is further from PyTorch's than it may be, else 0."""
        return AccuracyError.exit_code if self.report.missed else 0

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"bundle": str(self.bundle), **self.report.model_dump(mode="json"), "exit_code": self.exit_code}


def analyse(
    bundle: StrPath,
    names: Sequence[str],
    *,
    rows: int = ROWS,
    seed: int = 0,
    model: str | None = None,
    weights: StrPath | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> AnalysisResult:
    """Runs analyses over PyTorch and a bundle's artifact, and puts what they found into the bundle and its report.

    Args:
        bundle: The bundle's folder.
        names: Registered analyses; `all` for every one that suits the model.
        rows: How many rows of inputs are drawn.
        seed: Of their drawing.
        model: `module:callable` of a model that is not registered.
        weights: The weights file that the export was given.
        trust: See `verify`.
        progress: Told of every step.

    Raises:
        UnknownNameError: There is no such analysis.
        UsageError: One does not suit the model, or none does; so many rows do not fit into `MAX_BYTES`; the folder is not a bundle, or
            its model cannot be rebuilt.
        MachineError: This machine cannot execute the artifact, or lacks a package of an analysis.
        IntegrityError: A file is changed, missing or additional.
        IsthmusError: PyTorch's own outputs are not finite.
    """
    bundle = Path(bundle)
    step = (progress or Silent()).step
    if rows < 1:
        raise UsageError(f"the number of rows must be at least 1, got {rows}")
    for name in names:
        if name != ALL:
            ANALYSES.entry(name)
    opened = open_bundle(bundle, (), trust=trust, step=step)
    with step("building the model"):
        source = rebuild(opened.manifest, opened.example, model=model, weights=weights)
    requests = _requests(names, source, opened.manifest.model)
    stage = _executable([s for s in opened.target.stages(bundle, opened.manifest, trust=trust) if not s.sampling], bundle)
    inputs = _inputs(source, opened.cases, rows, seed)
    fine = opened.manifest.precision == "fp32"
    found: list[Finding] = []
    assert stage.open is not None
    with native_kernels(False), stage.open() as runner:
        with step("computing with PyTorch and with the artifact"):
            run = module_runner(source.module, source.example, source.spec.outputs if source.spec else None)
            expected = [first := dict(run(inputs[0]))]
            _check_bytes(rows, [inputs[0], first, first], len(inputs))
            expected += [dict(run(arrays)) for arrays in inputs[1:]]
            _check_finite(expected)
            got = [dict(runner.run(arrays)) for arrays in inputs]
        sides: list[tuple[list[Arrays], Run, bool]] = [(list(expected), run, True), (list(got), runner.run, fine)]
        for request in requests:
            with step(f"analysing {request.name}"):
                a, b = (Seen(inputs, outputs, expected, call, exact) for outputs, call, exact in sides)
                found += findings(request, a, b)
        device = runner.device
    report = report_of(found, stage=stage.name, device=device, rows=sum(_rows(arrays) for arrays in inputs), seed=seed)
    manifest = bundles.replace_file(bundle, opened.manifest, FILE, report.model_dump_json(indent=1).encode() + b"\n")
    manifest = bundles.replace_file(bundle, manifest, HTML, render(bundle).encode())
    return AnalysisResult(bundle, manifest, report)


def _requests(names: Sequence[str], source: Source, model: str) -> list[Analysis]:
    """The analyses of the model that were asked for. Every model with a batch can be asked whether its rows notice each other."""
    known = list(source.spec.analyses) if source.spec is not None else []
    if all(request.name != "coherence" for request in known) and _has_batch(source):
        known.append(Analysis("coherence"))
    suited = list(dict.fromkeys(request.name for request in known))
    if unsuited := [name for name in names if name != ALL and name not in suited]:
        raise UsageError(
            f"{', '.join(unsuited)} does not suit {model}",
            hint=f"what suits it: {', '.join(suited) or 'none'}; a model names its analyses in ModelSpec.analyses",
        )
    chosen = [request for request in known if ALL in names or request.name in names]
    if not chosen:
        raise UsageError(
            f"no analysis suits {model}" if names else "no analysis was asked for",
            hint="a registered model names its analyses in ModelSpec.analyses; `isthmus list analyses` describes them",
        )
    packages = {package: request.name for request in chosen for package in ANALYSES[request.name].needs}
    if missing := [Reason(f"{of} needs the package {p}") for p, of in packages.items() if importlib.util.find_spec(p) is None]:
        raise MachineError("packages of the analyses are missing", reasons=missing, hint="pip install 'isthmus[analysis]'")
    return chosen


def _has_batch(source: Source) -> bool:
    """Whether the first axis of every input is the batch."""
    spec = source.spec
    return spec is not None and bool(spec.dynamic) and all(spec.dynamic.get(name, {}).get(0) == "batch" for name in source.example)


def _executable(stages: Sequence[Stage], bundle: Path) -> Stage:
    able = [stage for stage in stages if stage.open is not None]
    if not able:
        reasons = [Reason(stage.reason, where=stage.name) for stage in stages]
        raise MachineError(f"this machine cannot execute the artifact in {bundle}", reasons=reasons, hint="see `isthmus doctor`")
    return able[-1]


def _inputs(source: Source, cases: Mapping[str, Arrays], rows: int, seed: int) -> list[Arrays]:
    """Inputs of as many rows as are asked for; a bundle's own cases, where the model does not say how inputs are drawn."""
    if source.spec is None:
        return list(cases.values())
    rng = np.random.Generator(np.random.PCG64(seed))
    found: list[Arrays] = []
    while sum(map(_rows, found)) < rows:
        found.append({name: to_array(tensor) for name, tensor in source.spec.inputs(rng, source.sizes).items()})
        if len(found) == 1:
            _check_bytes(rows, found, -(-rows // _rows(found[0])))
    return found


def _check_bytes(rows: int, one_call: Sequence[Arrays], calls: int) -> None:
    """Refuses rows whose inputs and outputs do not fit.

    Raises:
        UsageError: They do not.
    """
    if (needed := calls * _bytes(one_call)) > MAX_BYTES:
        raise UsageError(
            f"the inputs and outputs of {rows} rows take {needed / 2**30:.1f} GiB, of {MAX_BYTES / 2**30:.0f} GiB at most",
            hint=f"--rows {max(1, int(rows * MAX_BYTES / needed))}",
        )


def _bytes(arrays: Sequence[Arrays]) -> int:
    return sum(array.nbytes for one in arrays for array in one.values())


def _check_finite(expected: Sequence[Arrays]) -> None:
    reasons = [
        Reason("holds values that are not finite", where=name)
        for name in expected[0]
        if any(arrays[name].dtype.kind in "fc" and not np.isfinite(arrays[name]).all() for arrays in expected)
    ]
    if reasons:
        raise IsthmusError(
            "PyTorch's own outputs are not finite, so there is nothing to compare with", reasons=reasons, hint="check the weights"
        )


def _rows(arrays: Arrays) -> int:
    first = next(iter(arrays.values()))
    return int(first.shape[0]) if first.ndim else 1
