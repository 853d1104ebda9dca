"""The arguments of an export, checked before torch, onnx or a vendor SDK is imported, and all problems reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from .destination import check_destination
from .errors import IsthmusError, Reason, UnknownNameError, UsageError, WeightsError
from .onnx import OPSETS
from .options import check_settings
from .preprocess import parse_preprocess
from .spec import MODELS, Dynamic, SizeRange
from .target import TARGETS, Target

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
"""Endings of files that are pickles, and so are refused by their names."""

RANDOM = "random"
"""What `--calibration-data` must say for inputs that mean nothing."""

_PASSED = (
    "model", "target", "precision", "opset", "batch_size", "inputs", "weights",
    "calibration_data", "calibration_size", "calibration_method", "calibration_preprocess", "calibration_table",
    "weight_rounding", "weight_scales", "smooth", "sampler", "atol", "rtol", "min_psnr", "seed", "force", "dry_run",
)  # fmt: skip


def targets_of_options() -> dict[str, list[str]]:
    """The names of the targets that have each option, by the option's field name."""
    by_option: dict[str, list[str]] = {}
    for target in (TARGETS[name] for name in TARGETS):
        for name in target.Options.model_fields:
            by_option.setdefault(name, []).append(target.name)
    return by_option


def checked(given: Mapping[str, Any], *, config_settings: Mapping[str, Any], problems: Sequence[IsthmusError]) -> dict[str, Any]:
    """Checks the values of a command line's options.

    Args:
        given: Values by option: `model`, `target`, `output`, `precision`, `opset`, `batch_size`, `settings` (texts `key=value`), `weights`,
            `inputs`, `dynamic` (texts), `calibration_data`, `calibration_size`, `calibration_method`, `calibration_preprocess`,
            `calibration_table`, `sampler`, `atol`, `rtol`, `min_psnr`, `seed`,
            `force`, `dry_run`, and the targets' options as texts.
        config_settings: Settings that a configuration file gave; `settings` wins over them.
        problems: What was found wrong before.

    Returns:
        The keyword arguments of `pipeline.export`.

    Raises:
        UsageError: Something is wrong with the call; with several problems the reasons list them all.
        IsthmusError: The only problem is a file or folder that cannot be used.
    """
    found = list(problems)
    model, output = given["model"], given["output"]
    target = _target(given, found)
    common = _common(given, config_settings, found)
    options = _options(target, given, found)
    if output is None and target is not None and model is not None and not found:
        output = Path(f"{model.rpartition(':')[2]}-{target.name}-{given['precision'] or target.precisions[0]}")
    if output is not None and not given["dry_run"]:
        try:
            check_destination(output, force=given["force"])
        except IsthmusError as error:
            found.append(error)
    _raise_all(found)
    return {**{name: given[name] for name in _PASSED}, **common, "output": output, "options": options}


def checked_calibration(given: Mapping[str, Any], *, problems: Sequence[IsthmusError]) -> dict[str, Any]:
    """Checks the values of the options of `isthmus calibrate`, which are options of `export`, and `output`.

    Args:
        given: Values by option.
        problems: What was found wrong before.

    Returns:
        The keyword arguments of `pipeline.calibrate`.

    Raises:
        UsageError, IsthmusError: See `checked`.
    """
    found = list(problems)
    common = _common(given, {}, found)
    _check_file(given, "calibration.json", found)
    if (opset := given["opset"]) is not None and opset not in OPSETS:
        found.append(UsageError(f"--opset: got {opset}", hint=f"one of: {', '.join(map(str, sorted(OPSETS)))}"))
    _raise_all(found)
    return {**given, **common}


def checked_tuning(given: Mapping[str, Any], *, problems: Sequence[IsthmusError]) -> dict[str, Any]:
    """Checks the values of the options of `isthmus tune`.

    Args:
        given: Values by option.
        problems: What was found wrong before.

    Returns:
        The keyword arguments of `pipeline.tune`.

    Raises:
        UsageError, IsthmusError: See `checked`.
    """
    found = list(problems)
    common = _common(given, {}, found)
    _check_file(given, "recipe.yaml", found)
    if given["precision"] is None:
        found.append(UsageError("--precision is missing", hint="one of: fp8, int8"))
    if all(given[name] is None for name in ("min_sqnr", "min_psnr", "max_lpips")):
        found.append(UsageError("a budget of accuracy is missing", hint="for example --min-sqnr 28, or --min-psnr 35 for pictures"))
    if given["target"] is not None:
        asked = {"sampler": None, "precision": None, "opset": given["opset"], "target": given["target"]}
        target = _target(asked, found)
        if target is not None and given["precision"] and f"{given['precision']}_include" not in target.Options.model_fields:
            hint = "leave --target out"
            found.append(UsageError(f"{target.name} cannot be told which modules compute in {given['precision']}", hint=hint))
    if given["address"] is not None and given["executor_name"] != "ray":
        found.append(UsageError("--address is for --executor ray", hint="leave it out, or give both"))
    _raise_all(found)
    return {**given, **common, "address": given["address"] or ""}


def _check_file(given: Mapping[str, Any], example: str, found: list[IsthmusError]) -> None:
    """Checks the file that a command writes."""
    output = given["output"]
    if output is None:
        found.append(UsageError("-o is missing", hint=f"for example -o {example}"))
    elif output.exists() and not (given["force"] and output.is_file()):
        found.append(UsageError(f"the output {output} exists", hint="give --force to replace a file, or another -o"))


def _common(given: Mapping[str, Any], config_settings: Mapping[str, Any], found: list[IsthmusError]) -> dict[str, Any]:
    """Checks what says which model, with which weights, on which data. Returns `settings` and `dynamic` as values."""
    model = given["model"]
    if model is None:
        found.append(UsageError("MODEL is missing", hint="`isthmus list models` shows the names"))
    settings = _settings(model, given["settings"] or (), config_settings, found) if model is not None else {}
    dynamic = [d for text in given["dynamic"] or () if (d := _dynamic(text, found)) is not None]
    _check_weights(given["weights"], found)
    _check_data(given["calibration_data"], given["calibration_preprocess"], found)
    if given["inputs"] is not None:
        _check_callable("--inputs", given["inputs"], found)
        if model is not None and ":" not in model:
            found.append(UsageError("--inputs is for a MODEL of the form module:callable; a registered model has its own"))
    if model is not None and ":" in model and given["batch_size"] is not None:
        hint = "the batch size of your module is that of its example inputs"
        found.append(UsageError("--batch-size is for registered models", hint=hint))
    return {"settings": settings, "dynamic": dynamic}


def _check_data(data: str | None, preprocess: str | None, found: list[IsthmusError]) -> None:
    if data is not None and data != RANDOM and not Path(data).exists():
        if ":" in data:
            _check_callable("--calibration-data", data, found)
        else:
            hint = f"give an .npz or .safetensors file, a folder of them or of pictures, module:callable, or the word `{RANDOM}`"
            found.append(UsageError(f"--calibration-data: {data} does not exist", hint=hint))
    if preprocess is not None:
        try:
            parse_preprocess(preprocess)
        except UsageError as error:
            found.append(error)


def _raise_all(problems: Sequence[IsthmusError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        reasons = [reason for p in problems for reason in (Reason(p.message, fix=p.hint), *p.reasons)]
        kind = UsageError if any(isinstance(p, UsageError) for p in problems) else IsthmusError
        raise kind(f"the call has {len(problems)} problems", reasons=reasons)


def _target(given: Mapping[str, Any], problems: list[IsthmusError]) -> type[Target[BaseModel]] | None:
    if given["target"] is None:
        problems.append(UsageError("--target is missing", hint=f"one of: {', '.join(TARGETS)}"))
        return None
    try:
        target = TARGETS[given["target"]]
    except UnknownNameError as error:
        problems.append(error)
        return None
    if given["precision"] is not None and given["precision"] not in target.precisions:
        hint = f"one of: {', '.join(target.precisions)}"
        problems.append(UsageError(f"--precision: {target.name} has no {given['precision']!r}", hint=hint))
    if given["sampler"] is not None and given["sampler"] not in target.samplers:
        hint = f"one of: {', '.join(target.samplers)}"
        problems.append(UsageError(f"--sampler: {target.name} has no {given['sampler']!r}", hint=hint))
    if given["opset"] is not None and given["opset"] not in target.opsets:
        hint = f"it takes: {', '.join(map(str, sorted(target.opsets))) or 'none'}"
        problems.append(UsageError(f"--opset: {target.name} does not take opset {given['opset']}", hint=hint))
    return target


def _settings(model: str, texts: Sequence[str], config: Mapping[str, Any], problems: list[IsthmusError]) -> dict[str, Any]:
    settings: dict[str, Any] = dict(config)
    for text in texts:
        key, equals, value = text.partition("=")
        if equals:
            settings[key.strip()] = value
        else:
            problems.append(UsageError(f"--set: got {text!r}, expected key=value"))
    if ":" in model:
        _check_callable("MODEL", model, problems)
        if settings:
            problems.append(UsageError("--set is for registered models", hint="set these values where your callable makes the module"))
        return {}
    if model not in MODELS and Path(model).is_dir():
        hint = "give a name of `isthmus list models`, and the folder as --weights"
        problems.append(UsageError(f"MODEL {model!r} is a folder, and folders are not read as models", hint=hint))
        return {}
    try:
        values, reasons = check_settings(MODELS.entry(model), settings)
    except UnknownNameError as error:
        problems.append(error)
        return {}
    problems.extend(UsageError(f"{r.where}: {r.what}", hint=r.fix) for r in reasons)
    return values


def _check_callable(what: str, text: str, problems: list[IsthmusError]) -> None:
    module, _, name = text.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        hint = "for example my_package.models:make_unet"
        problems.append(UsageError(f"{what}: got {text!r}, expected module:callable", hint=hint))


def _options(target: type[Target[BaseModel]] | None, given: Mapping[str, Any], problems: list[IsthmusError]) -> dict[str, Any]:
    by_option = targets_of_options()
    texts = {name: given[name] for name in by_option if given.get(name) is not None}
    if target is None:
        return {}
    for name in [n for n in texts if target.name not in by_option[n]]:
        owners = " and ".join(by_option[name])
        problems.append(UsageError(f"--{name.replace('_', '-')} is an option of {owners}, not of {target.name}"))
        del texts[name]
    values = {n: _split(text) if _is_sequence(target.Options.model_fields[n].annotation) else text for n, text in texts.items()}
    try:
        target.Options.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            option = f"--{str(detail['loc'][0]).replace('_', '-')}" if detail["loc"] else f"the options of {target.name}"
            problems.append(UsageError(f"{option}: got {detail['input']!r}: {detail['msg']}"))
    return values


def _is_sequence(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", annotation) in (tuple, list)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _dynamic(text: str, problems: list[IsthmusError]) -> Dynamic | None:
    place, _, bounds = text.partition("=")
    name, _, axis = place.rpartition(":")
    try:
        low, opt, high = (int(bound) for bound in bounds.split(","))
        number = int(axis)
    except ValueError:
        name = ""
    if not name:
        hint = "for example --dynamic x:0=1,2,8"
        problems.append(UsageError(f"--dynamic: got {text!r}, expected name:axis=min,opt,max", hint=hint))
        return None
    try:
        return Dynamic(name, number, SizeRange(low, opt, high))
    except ValueError as error:
        problems.append(UsageError(f"--dynamic {text}: {error}"))
        return None


def _check_weights(weights: Path | None, problems: list[IsthmusError]) -> None:
    if weights is None:
        return
    if not weights.exists():
        problems.append(UsageError(f"--weights: {weights} does not exist"))
    elif weights.suffix.lower() in PICKLES:
        problems.append(
            WeightsError(
                f"--weights: {weights} is a pickle by its name, and reading a pickle can run any code",
                hint="convert it where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')",
            )
        )
