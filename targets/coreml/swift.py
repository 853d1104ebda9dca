"""Writes a Swift package around a bundle's package: most of it is plain Swift from `runtime/swift/`, the rest is filled from the manifest.

Nothing of it is compiled here. Texts of the manifest reach Swift through `swift_names` alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ...exporter.errors import IntegrityError, Reason, UnsupportedError
from ...exporter.manifest import Manifest, TensorInfo
from ...exporter.sampling import LoopSampler
from ...exporter.subject import evaluate
from ...exporter.target import Embedded
from .golden import converted, scalar_type, write_golden
from .options import CoreMLOptions
from .session import Interface
from .swift_names import identifiers, literal, module_name, shown, tool_name

RUNTIME = Path(__file__).parent / "runtime" / "swift"
MODEL = "model.mlpackage"
NOT_COMPILED = "Not compiled here, and not run: that takes a Mac. `swift test` there compares Core ML with PyTorch's outputs."

# Releases of the same year. visionOS began with iOS 17.
_PLATFORMS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "iOS16": (("macOS", "13.0"), ("iOS", "16.0"), ("tvOS", "16.0"), ("visionOS", "1.0")),
    "iOS17": (("macOS", "14.0"), ("iOS", "17.0"), ("tvOS", "17.0"), ("visionOS", "1.0")),
    "iOS18": (("macOS", "15.0"), ("iOS", "18.0"), ("tvOS", "18.0"), ("visionOS", "2.0")),
    "iOS26": (("macOS", "26.0"), ("iOS", "26.0"), ("tvOS", "26.0"), ("visionOS", "26.0")),
}
_MOST_NAMES = 6  # in one size, of which every combination of three values is computed
_SCALARS = {"float32": "Float", "int32": "Int32", "bool": "Bool"}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the templates are filled from, all of it checked.

    A feature (an input, output or state) has two names: `name`, the package's, and `title`, PyTorch's, which people know.
    """

    options: CoreMLOptions
    interface: Interface
    packages: tuple[str, ...]
    files: Mapping[str, str]
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    states: tuple[dict[str, Any], ...]
    sampler: LoopSampler | None
    notes: tuple[str, ...]


def write_package(folder: Path, manifest: Manifest, destination: Path, *, sampler: LoopSampler | None) -> Embedded:
    """Writes the Swift package of a bundle into `destination`, a folder that exists and is empty; see `exporter.target.Target.embed`.

    Raises:
        UnsupportedError: A value's type has no counterpart in Core ML, or states are kept by several functions; all reasons are listed.
        IntegrityError: The manifest names packages, outputs or sizes that it does not hold.
    """
    plan = _plan(manifest, sampler)
    module, tool = module_name(manifest.model), tool_name(manifest.model)
    sources, tests = destination / "Sources" / module, destination / "Tests" / f"{module}Tests"
    resources = sources / "Resources"
    for path in (resources, destination / "Sources" / f"{module}Tool", tests):
        path.mkdir(parents=True)
    for name in plan.files:
        (resources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, resources / name)
    (resources / "model.json").write_text(_json(_description(manifest, plan)), "utf-8")
    write_golden(folder, tests / "Golden", plan.interface, plan.sampler)

    for source in sorted((RUNTIME / "Sources").glob("*.swift")):
        if plan.sampler is not None or source.name != "Sampling.swift":
            shutil.copyfile(source, sources / source.name)
    values = _values(manifest, plan, module, tool)
    written = {
        "Package.swift.j2": destination / "Package.swift",
        "README.md.j2": destination / "README.md",
        "Sources/Interface.swift.j2": sources / "Interface.swift",
        "Tool/Tool.swift.j2": destination / "Sources" / f"{module}Tool" / "Tool.swift",
        "Tests/GoldenTests.swift.j2": tests / "GoldenTests.swift",
    }
    if plan.sampler is not None:
        written["Tests/SamplerTests.swift.j2"] = tests / "SamplerTests.swift"
    for template, path in written.items():
        path.write_text(_filled(template, values), "utf-8")
    return Embedded(name=module, notes=(NOT_COMPILED, *plan.notes))


def _plan(manifest: Manifest, sampler: LoopSampler | None) -> _Plan:
    try:
        options = CoreMLOptions.model_validate(manifest.options.get("coreml", {}))
        states = tuple(TensorInfo.model_validate(state) for state in manifest.details.get("states", ()))
        interface = Interface.of(manifest)
        if missing := set(interface.states) - {state.name for state in states}:
            raise ValueError(f"it has outputs of states that it does not name: {', '.join(sorted(missing))}")
    except (ValidationError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise IntegrityError(f"the manifest cannot be used: {error}", hint="export again with this version of isthmus") from error
    packages = tuple(manifest.details.get("packages", ())) or (MODEL,)
    files = {}
    for package in packages:
        if not isinstance(package, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*\.mlpackage", package):
            raise IntegrityError(f"the manifest names a package {package!r}", hint="export again")
        held = {name: digest for name, digest in manifest.files.items() if name.startswith(f"{package}/")}
        if not held:
            raise IntegrityError(f"the manifest holds no file of {package}", hint="export again")
        files.update(held)
    reasons = [
        Reason(f"{info.dtype} is none of Core ML's types", where=info.name, fix="export the model with float, integer or boolean values")
        for info in (*manifest.inputs, *manifest.outputs, *states)
        if not scalar_type(info.dtype)
    ]
    if states and interface.functions:
        what = "several functions keep states, and Core ML does not say whether one takes another's"
        reasons.append(Reason(what, where=", ".join(state.name for state in states), fix="export with --shapes fixed"))
    if reasons:
        raise UnsupportedError("a Swift program cannot take this model", reasons=reasons)
    fits, note = _fitting(manifest, states, sampler)
    returned = {info.name: name for name, info in interface.outputs.items()}
    return _Plan(
        options=options,
        interface=interface,
        packages=packages,
        files=files,
        inputs=tuple(
            _feature(info, interface.inputs[info.name], manifest, options)
            for info in manifest.inputs
            if interface.inputs[info.name] not in {state.name for state in states}
        ),
        outputs=tuple(_feature(info, returned[info.name], manifest, options) for info in manifest.outputs if info.name in returned),
        states=tuple(_feature(info, info.name, manifest, options) for info in states),
        sampler=sampler if fits else None,
        notes=(note,) if note else (),
    )


def _fitting(manifest: Manifest, states: Sequence[TensorInfo], sampler: LoopSampler | None) -> tuple[bool, str]:
    """Whether the sampler is one of the artifact's: it may have been exported with other settings. Else why not."""
    if sampler is None:
        return False, "No sampling loop: the model comes without a sampler."
    inputs = {info.name: info for info in manifest.inputs}
    outputs = {info.name: info for info in manifest.outputs}
    others = set(inputs) - {sampler.latent, sampler.time}
    named = {sampler.latent, sampler.time} <= set(inputs) and sampler.output in outputs
    if states or not named or (sampler.guidance > 1 and others != set(sampler.null)):
        return False, "No sampling loop: the model's inputs and outputs are not those of its sampler."
    rows = {info.shape[:1] for info in inputs.values()}
    same = inputs[sampler.latent].shape == outputs[sampler.output].shape and len(inputs[sampler.time].shape) == 1
    null = all(array.shape[1:] == inputs[name].shape[1:] for name, array in sampler.null.items())
    if len(rows) != 1 or not same or not null:
        return False, "No sampling loop: the shapes of the model's inputs and outputs are not those of its sampler."
    return True, ""


def _feature(info: TensorInfo, name: str, manifest: Manifest, options: CoreMLOptions) -> dict[str, Any]:
    sizes: list[dict[str, Any]] = []
    for size in info.shape:
        if isinstance(size, int):
            sizes.append({"least": size, "most": size})
            continue
        lengths = _lengths(size, manifest.sizes)
        if not lengths:
            raise IntegrityError(f"the manifest has no range for the size {size!r} of {info.name!r}", hint="export again")
        only = {"only": lengths} if options.shapes in ("enumerated", "functions") else {}
        sizes.append({"name": size, "least": lengths[0], "most": lengths[-1], **only})
    return {"name": name, "title": info.name, "type": scalar_type(info.dtype), "sizes": sizes}


def _lengths(size: str, ranges: Mapping[str, tuple[int, int, int]]) -> list[int]:
    """What a size is at the smallest, the usual and the largest value of each named size in it, sorted; empty when that is not known."""
    names = [name for name in ranges if name == size or re.search(rf"(?<!\w){re.escape(name)}(?!\w)", size)]
    if len(names) > _MOST_NAMES:
        return []
    found = {evaluate(size, dict(zip(names, values, strict=True))) for values in itertools.product(*(ranges[name] for name in names))}
    return [] if None in found else sorted(length for length in found if length is not None)


def _description(manifest: Manifest, plan: _Plan) -> dict[str, Any]:
    """The contents of `model.json`; `Description` in Swift."""
    names = {"max_relative": "maxRelative", "min_psnr": "minPSNR", "atol": "atol", "rtol": "rtol"}
    functions = plan.interface.functions
    return {
        "model": manifest.model,
        "precision": manifest.precision,
        "packages": plan.packages,
        "digest": hashlib.sha256("\n".join(f"{digest} {name}" for name, digest in sorted(plan.files.items())).encode()).hexdigest(),
        "computeUnits": plan.options.compute_units,
        **{
            kind: [{key: value for key, value in feature.items() if key != "title"} for feature in features]
            for kind, features in (("inputs", plan.inputs), ("outputs", plan.outputs), ("states", plan.states))
        },
        **({"functions": [{"name": name, "shapes": shapes} for name, shapes in functions.items()]} if functions else {}),
        "tolerance": {names[key]: bound for key, bound in manifest.tolerance.items() if key in names},
        **({"sampler": _sampler(plan.sampler, plan.interface)} if plan.sampler else {}),
    }


def _sampler(sampler: LoopSampler, interface: Interface) -> dict[str, Any]:
    """`Sampler` in Swift: every number as float32 has it, which is what the Python sampler computes in."""
    return {
        "calls": [
            {
                **{key: _float32(getattr(call, key)) for key in ("time", "change", "keep", "previous", "noise")},
                "advances": call.advances,
            }
            for call in sampler.calls
        ],
        "guidance": _float32(sampler.guidance),
        "null": [
            {
                "name": interface.inputs.get(name, name),
                "type": scalar_type(array.dtype.name),
                "shape": list(array.shape),
                "values": converted(name, array).astype(np.float64).reshape(-1).tolist(),
            }
            for name, array in sampler.null.items()
        ],
        "start": _float32(sampler.start),
        "latent": interface.inputs[sampler.latent],
        "time": interface.inputs[sampler.time],
        "output": next(name for name, info in interface.outputs.items() if info.name == sampler.output),
    }


def _float32(value: float) -> float:
    return float(np.float32(value))


def _values(manifest: Manifest, plan: _Plan, module: str, tool: str) -> dict[str, Any]:
    """Everything that the templates name. Texts of the manifest among it go through a filter there."""
    from importlib.metadata import version

    inputs, outputs = _fields(plan.inputs), _fields(plan.outputs)
    structs = [
        {"name": "Inputs", "lead": "What the model takes.", "keyword": "var", "writable": True, "fields": inputs},
        {"name": "Outputs", "lead": "What the model gives.", "keyword": "let", "writable": False, "fields": outputs},
    ]
    conditions = []
    if plan.sampler is not None:
        conditions = [f for f in inputs if f["title"] not in (plan.sampler.latent, plan.sampler.time)]
        lead = "What the sampler does not set of the inputs: one row for each picture."
        structs.append({"name": "Conditions", "lead": lead, "keyword": "var", "writable": True, "fields": conditions})
    platforms = _PLATFORMS[plan.options.minimum_deployment_target]
    return {
        "isthmus": version("isthmus"),
        "module": module,
        "tool": tool,
        "model": manifest.model,
        "precision": manifest.precision,
        "platforms": platforms,
        "macos": dict(platforms)["macOS"].removesuffix(".0"),
        "packages": plan.packages,
        "structs": structs,
        "sampler": plan.sampler is not None,
        "stateful": bool(plan.states),
        "functions": tuple(plan.interface.functions),
        "calls": len(plan.sampler.calls) if plan.sampler else 0,
        "guidance": plan.sampler.guidance if plan.sampler else 0,
        "units": f"compute units: {plan.options.compute_units}",
        "verdict": _verdict(manifest),
        "tolerance": _tolerance(manifest.tolerance),
        "example": "".join(f"--input {shown(f['name'])}={'1,2,3,4' if f['rank'] == 1 else 'FILE'} " for f in conditions),
        "rows": [
            {"kind": kind, "name": _known_as(f), "identifier": f["identifier"], "type": f["type"], "shape": f["shape"]}
            for kind, fields in (("input", inputs), ("output", outputs), ("state", _fields(plan.states)))
            for f in fields
        ],
    }


def _fields(features: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = identifiers(feature["title"] for feature in features)
    fields = []
    for feature, identifier in zip(features, names, strict=True):
        shape = f"[{', '.join(_size(size) for size in feature['sizes'])}]"
        fields.append(
            {
                "name": feature["name"],
                "title": feature["title"],
                "identifier": identifier,
                "type": feature["type"],
                "case": feature["type"],
                "scalar": _SCALARS[feature["type"]],
                "shape": shape,
                "rank": len(feature["sizes"]),
                "comment": shown(f"{feature['title']}: {feature['type']} {shape}"),
            }
        )
    return fields


def _known_as(field: Mapping[str, Any]) -> str:
    """PyTorch's name, and the package's where it is another."""
    return field["title"] if field["title"] == field["name"] else f"{field['title']} ({field['name']} in the package)"


def _size(size: Mapping[str, Any]) -> str:
    if size["least"] == size["most"]:
        return str(size["least"])
    lengths = f"one of {size['only']}" if "only" in size else f"{size['least']} to {size['most']}"
    return f"{size['name']}: {lengths}"


def _verdict(manifest: Manifest) -> str:
    found = {stage.name: stage.verdict for stage in manifest.stages}
    interpreted, device = found.get("mil", "not run"), found.get("device", "not run")
    return f"The model in it is `{interpreted}` in isthmus's interpreter of ML Programs, and `{device}` in Core ML on a device."


def _tolerance(bounds: Mapping[str, float]) -> str:
    words = {
        "max_relative": "max |error| / range of {:g}",
        "min_psnr": "a PSNR of {:g} dB",
        "atol": "atol {:g}",
        "rtol": "rtol {:g}",
    }
    return ", ".join(words[key].format(bound) for key, bound in bounds.items() if key in words) or "the bundle's tolerance"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _filled(template: str, values: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # noqa: S701 - Swift and Markdown are not HTML: texts go through the two filters
        loader=FileSystemLoader(RUNTIME), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(swift=literal, markdown=shown)
    return environment.get_template(template).render(values)
