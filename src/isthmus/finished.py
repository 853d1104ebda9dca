"""What is done with a finished bundle: it is built, verified and inspected. Part of the Python API, see `pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from isthmus.calibration.report import rewrite_report
from isthmus.calibration.verify import SAMPLE_TOLERANCES, run_stage
from isthmus.exporter import bundle as bundles
from isthmus.exporter.destination import rewriting
from isthmus.exporter.errors import AccuracyError, IntegrityError, UsageError
from isthmus.exporter.manifest import weakest
from isthmus.exporter.paths import StrPath
from isthmus.exporter.spec import Tolerance
from isthmus.exporter.target import TARGETS
from isthmus.results import BuildResult, Progress, Silent, VerifyResult, json_values, misses, tool_versions


def build(bundle: StrPath, *, trust: bool = False, force: bool = False, progress: Progress | None = None) -> BuildResult:
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
    bundle = Path(bundle)
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
    with rewriting(bundle) as folder:
        with step(f"building for {manifest.device}"):
            built = target.build(folder, manifest, required=True, trust=trust)
        assert built is not None
        changed = [built.stage]
        manifest = manifest.model_copy(
            update={
                "device": built.device or manifest.device,
                "details": {**manifest.details, **json_values(built.details)},
                "versions": {**manifest.versions, **tool_versions()},
            }
        )
        for stage in target.stages(folder, manifest, trust=trust):
            if stage.name == "device":
                with step(f"verifying the artifact: {stage.name}"):
                    bounds, drawn = Tolerance(**manifest.tolerance), SAMPLE_TOLERANCES.get(manifest.precision)
                    changed.append(run_stage(stage, inputs, reference, bounds, sample_tolerance=drawn)[0])
        names = {stage.name for stage in changed}
        stages = (*(s for s in manifest.stages if s.name not in names), *changed)
        manifest = manifest.model_copy(update={"stages": stages, "verdict": weakest(stages)})
        with step("writing the report"):
            rewrite_report(folder, manifest, notes=built.notes)
            manifest = bundles.write_manifest(folder, manifest)
    result = BuildResult(bundle, manifest, tuple(changed))
    if result.exit_code:
        raise AccuracyError(f"{bundle} was built, and the engine is not what was asked for", reasons=misses(result.stages), result=result)
    return result


def verify(bundle: StrPath, *, trust: bool = False, progress: Progress | None = None) -> VerifyResult:
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
    bundle = Path(bundle)
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
            bounds = SAMPLE_TOLERANCES.get(manifest.precision)
            found.append(run_stage(stage, inputs, reference, tolerance, sample_tolerance=bounds)[0])
    result = VerifyResult(bundle, manifest, tuple(found))
    if result.exit_code:
        raise AccuracyError(
            f"the artifact in {bundle} is not within its tolerance of PyTorch", reasons=misses(result.stages), result=result
        )
    return result


def inspect(bundle: StrPath) -> dict[str, Any]:
    """What a bundle is, as JSON values: its manifest without measurements and hashes, and the size of every file in bytes.

    A file that is missing, or whose name leads out of the bundle, has no size: `verify` says which.

    Raises:
        UsageError: The folder is not a bundle.
        IntegrityError: Its manifest is not one that this version understands.
    """
    bundle = Path(bundle)
    manifest = bundles.read_manifest(bundle)
    value: dict[str, Any] = manifest.model_dump(mode="json", by_alias=True, exclude={"stages", "files"})
    value["stages"] = [{"name": s.name, "verdict": s.verdict, "reason": s.reason, "device": s.device} for s in manifest.stages]
    paths = {name: bundles.inside(bundle, name) for name in manifest.files}
    value["files"] = {name: path.stat().st_size if path is not None and path.is_file() else None for name, path in paths.items()}
    return value
