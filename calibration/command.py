"""The command that makes a bundle again, from its manifest."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..exporter.manifest import Manifest
from ..exporter.options import check_settings
from ..exporter.spec import MODELS, ModelSpec, Tolerance
from ..exporter.target import TARGETS
from .data import DEFAULT_SIZE, RANDOM, TRAJECTORIES
from .metrics import DEFAULT_TOLERANCES


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        words: Its words, not quoted.
        missing: What the manifest does not hold, and the caller has to put in, one sentence each; empty where the command is complete.
    """

    words: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The words, quoted for a POSIX shell."""
        return shlex.join(self.words)


def command_of(manifest: Manifest) -> Command:
    """The `isthmus export` that makes a bundle again.

    What has its default value is left out, so that the command reads like one that was typed. The defaults are those of this version.
    """
    spec = _spec(manifest)
    missing: list[str] = []
    model = manifest.model
    if manifest.model not in MODELS:
        model = f"MODULE:{manifest.model}"
        missing.append(
            "MODULE is the Python module of the model's callable; --inputs may be needed with it. A bundle does not hold their code."
        )
    words = ["isthmus", "export", model, "--target", manifest.target, "--precision", manifest.precision]
    if manifest.opset is not None:
        words += ["--opset", str(manifest.opset)]
    if manifest.weights.origin == "file":
        words += ["--weights", manifest.weights.path]
        missing.append(f"{manifest.weights.path} is the file of weights whose sha256 is {manifest.weights.sha256}.")
    words += [
        *_general(manifest),
        *_dynamic(manifest, spec),
        *_bounds(manifest, spec),
        *_calibration(manifest, missing),
        *_target(manifest),
    ]
    return Command(tuple(words), tuple(missing))


def _spec(manifest: Manifest) -> ModelSpec | None:
    """What the registry says of the model; None for one that is not registered, or not with these settings any more."""
    if manifest.model not in MODELS:
        return None
    settings, reasons = check_settings(MODELS.entry(manifest.model), _mapping(manifest.options.get("settings")))
    try:
        return MODELS[manifest.model].spec(settings) if not reasons else None
    except ValueError:  # they contradict each other
        return None


def _mapping(value: object) -> Mapping[str, Any]:
    """The options of a part. A manifest holds any JSON, and one that was changed by hand still has a page."""
    return value if isinstance(value, Mapping) else {}


def _general(manifest: Manifest) -> Iterator[str]:
    options = manifest.options
    for key, value in _mapping(options.get("settings")).items():
        yield from ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    of_weights = {"weight_rounding": "nearest", "weight_scales": "max", "smooth": None}
    for name, default in {"batch_size": None, "sampler": "step", "seed": 0, **of_weights}.items():
        if options.get(name, default) != default:
            yield from (_flag(name), str(options[name]))


def _dynamic(manifest: Manifest, spec: ModelSpec | None) -> Iterator[str]:
    """The axes that were asked for: all of them, or those whose ranges are not the registered model's own."""
    own = {size: (r.min, r.opt, r.max) for size, r in spec.ranges.items()} if spec is not None else {}
    told = {size for size, range_ in own.items() if manifest.sizes.get(size) == range_}
    for place, size in _mapping(manifest.options.get("dynamic")).items():
        if size in manifest.sizes and size not in told:
            yield from ("--dynamic", f"{place}={','.join(map(str, manifest.sizes[size]))}")
            told |= {size} if spec is not None else set()  # the same size on other inputs varies with it


def _bounds(manifest: Manifest, spec: ModelSpec | None) -> Iterator[str]:
    own = TARGETS[manifest.target].tolerances if manifest.target in TARGETS else {}
    usual = {**DEFAULT_TOLERANCES, **own, **(spec.tolerances if spec is not None else {})}.get(manifest.precision, Tolerance())
    default = {key: value for key, value in dataclasses.asdict(usual).items() if value is not None}
    for name in ("atol", "rtol", "min_psnr"):
        if name in manifest.tolerance and manifest.tolerance[name] != default.get(name):
            yield from (_flag(name), repr(manifest.tolerance[name]))


def _calibration(manifest: Manifest, missing: list[str]) -> Iterator[str]:
    used = _mapping(manifest.details.get("calibration"))
    if table := manifest.options.get("calibration_table"):
        yield from ("--calibration-table", str(table))
        missing.append(f"{table} is the file of that name in this bundle.")
        return
    source, drawn = used.get("source", TRAJECTORIES), used.get("size")
    if used.get("method", "max") != "max":
        yield from ("--calibration-method", str(used["method"]))
    if source != TRAJECTORIES:
        yield from ("--calibration-data", str(source))
    if source not in (TRAJECTORIES, RANDOM):
        missing.append(f"{source} is the calibration data whose inputs have the sha256 {used.get('sha256')}.")
    # Of a file or folder all sets are used where no size was asked for, and what is drawn has one by default.
    size = manifest.options.get("calibration_size", drawn if source in (TRAJECTORIES, RANDOM) and drawn != DEFAULT_SIZE else None)
    for name, value in (("calibration_size", size), ("calibration_preprocess", manifest.options.get("calibration_preprocess"))):
        if value is not None:
            yield from (_flag(name), str(value))


def _target(manifest: Manifest) -> Iterator[str]:
    """The target's own options that are not its defaults."""
    given = _mapping(manifest.options.get(manifest.target))
    defaults = TARGETS[manifest.target].Options().model_dump(mode="json") if manifest.target in TARGETS else {}
    for name, value in given.items():
        if value is not None and value != defaults.get(name):
            text = ",".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else json.dumps(value)
            yield from (_flag(name), text)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
