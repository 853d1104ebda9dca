"""The pages of finished bundles: one bundle's report, with or without its modules, and two side by side. Part of the Python API, see
`pipeline`.
"""

from __future__ import annotations

import json
from pathlib import Path

from isthmus.calibration.compare import DEFAULT_THRESHOLD, PAGE_MARK, Comparison, compare_bundles, comparison_page
from isthmus.calibration.module_report import FILE as MODULES
from isthmus.calibration.module_report import ModuleReport
from isthmus.calibration.report import render
from isthmus.calibration.tune_report import FILE as TUNE
from isthmus.calibration.tune_report import read_tune
from isthmus.differences import bisect, errors_by_timestep
from isthmus.exporter import bundle as bundles
from isthmus.exporter.destination import write_whole
from isthmus.exporter.errors import IsthmusError, MachineError, UsageError
from isthmus.exporter.paths import StrPath
from isthmus.results import Progress

_REPORT = "report.html"
_MARKED = 2**16
"""Bytes of a page in which its mark is."""


def report(
    bundle: StrPath,
    *,
    modules: bool = False,
    model: str | None = None,
    weights: StrPath | None = None,
    trust: bool = False,
    tune: StrPath | None = None,
    progress: Progress | None = None,
) -> Path:
    """Renders the report of a bundle again, from what it holds, and returns the page's path.

    A page that is missing or differs is replaced, and its hash in the manifest with it; no other hash is touched.

    Args:
        bundle: The bundle's folder.
        modules: First compare every stage with PyTorch, module by module (see `differences.bisect`), and put what was found into the
            bundle, as `diff.json`; the page shows it from then on.
        model: With `modules`: see `bisect`, as for the others.
        weights: The weights file that the export was given.
        trust: See `verify`.
        tune: What `isthmus tune` wrote beside a recipe, `NAME.pareto.json`: it comes into the bundle, as `tune.json`, and its plot into the
            page.
        progress: Told of every step.

    Raises:
        UsageError: The folder is not a bundle; with `modules`, its model cannot be rebuilt; with `tune`, there is no such file, or the
            search was not for this model, weights, target and precision (all reasons are listed).
        IntegrityError: What the page is made from is not what the manifest says.
        IsthmusError: With `modules`, PyTorch or a stage fails.
    """
    bundle = Path(bundle)
    manifest = bundles.read_manifest(bundle)
    if tune is not None:
        if not (path := Path(tune)).is_file():
            raise UsageError(f"--tune: there is no file {tune}", hint="give the NAME.pareto.json that `isthmus tune` wrote")
        searched = read_tune(path)
        if reasons := searched.misfits(manifest):
            raise UsageError(f"{tune} is not of {bundle}", reasons=reasons, hint="give the search whose recipe the export was given")
        manifest = bundles.replace_file(bundle, manifest, TUNE, searched.model_dump_json(indent=1).encode() + b"\n")
    if modules:
        found = _modules(bundle, model=model, weights=weights, trust=trust, progress=progress)
        manifest = bundles.replace_file(bundle, manifest, MODULES, found.model_dump_json(indent=1).encode() + b"\n")
    path = bundle / _REPORT
    page = render(bundle).encode()
    if not path.is_file() or path.read_bytes() != page:
        bundles.replace_file(bundle, manifest, _REPORT, page)
    return path


def _modules(bundle: Path, *, model: str | None, weights: StrPath | None, trust: bool, progress: Progress | None) -> ModuleReport:
    found = bisect(bundle, model=model, weights=weights, trust=trust, progress=progress).summary()
    rows, reason = [], ""
    try:
        rows = errors_by_timestep(bundle, model=model, weights=weights, trust=trust, progress=progress)
    except (UsageError, MachineError) as error:  # no sampler, say: the modules are known all the same
        reason = error.message
    culprit = found["culprit"]
    value = {
        "culprit": {key: culprit[key] for key in ("stage", "module")} if culprit else None,
        "arisen": found["arisen"],
        "stages": found["stages"],
        "timesteps": rows,
        "no_timesteps": reason,
    }
    return ModuleReport.model_validate_json(json.dumps(value))


def compare_reports(a: StrPath, b: StrPath, *, threshold: float = DEFAULT_THRESHOLD, output: StrPath | None = None) -> Comparison:
    """Puts the reports of two bundles of one model side by side. Nothing is executed, and the bundles stay as they are.

    Args:
        a: The folder of the bundle that B is held to.
        b: The folder of the bundle that is judged.
        threshold: How much lower a SQNR or PSNR of B may be, dB.
        output: The page to write; None for none. A page of an earlier comparison is replaced, no other file is.

    Raises:
        UsageError: A folder is not a bundle; the two are not of one model, settings, weights, inputs and outputs (all reasons are
            listed); or `output` is a file of another kind.
        IntegrityError: A manifest, report or picture is not what this version writes.
        IsthmusError: The page cannot be written.
    """
    found = compare_bundles(Path(a), Path(b), threshold=threshold)
    if output is not None:
        _write_page(Path(output), comparison_page(found))
    return found


def _write_page(path: Path, page: str) -> None:
    path = path.absolute()
    try:
        other = path.is_dir() or (path.is_file() and PAGE_MARK.encode() not in path.read_bytes()[:_MARKED])
    except OSError as error:
        raise IsthmusError(f"cannot read {path}, which is to be replaced: {error.strerror}", hint="give another -o") from error
    if other:
        raise UsageError(f"the output {path} exists and is not a page of an earlier comparison", hint="give another -o")
    write_whole(path, page)
