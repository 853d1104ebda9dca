"""Where a model comes from: a registered name, `module:callable`, or a module in hand; all become a `Source`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import IsthmusError, Reason, UnsupportedError, UsageError
from .manifest import WeightsInfo
from .paths import StrPath
from .spec import MODELS, Dynamic, ModelSpec, SizeRange
from .weights import describe, load_weights, random_weights

Model = str | nn.Module | tuple[nn.Module, Sequence[torch.Tensor]]
"""What a caller may export: a registered name, `module:callable`, a module (with inputs), or a pair of module and example inputs."""


@dataclass(frozen=True)
class Source:
    """A model that is ready to be traced.

    Attributes:
        name: What it is called in the bundle.
        module: In eval mode.
        example: The example inputs, in the order of `forward`.
        dynamic: For each input, the axes that may vary and the named size on each.
        ranges: The range of each named size.
        sizes: The named sizes of the example; empty for a module that isthmus does not know.
        config: Its settings.
        weights: Where its weights came from.
        spec: Its spec, None for a module that isthmus does not know.
    """

    name: str
    module: nn.Module
    example: Mapping[str, torch.Tensor]
    dynamic: Mapping[str, Mapping[int, str]]
    ranges: Mapping[str, SizeRange]
    sizes: Mapping[str, int]
    config: Mapping[str, Any]
    weights: WeightsInfo
    spec: ModelSpec | None


def load_source(
    model: Model,
    *,
    settings: Mapping[str, Any],
    weights: StrPath | None,
    inputs: str | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None,
    dynamic: Sequence[Dynamic],
    batch_size: int | None,
    seed: int,
    fixed: str = "",
) -> Source:
    """Builds the module, loads its weights and makes its example inputs.

    Args:
        model: See `pipeline.export`, as for the others.
        settings: Settings of a registered model.
        weights: A weights file.
        inputs: Example inputs of a module.
        dynamic: Axes that may vary.
        batch_size: A fixed batch size.
        seed: Seed of random weights and inputs.
        fixed: The option by which all sizes are those of the example; empty where they may vary.

    Raises:
        UsageError: An argument does not fit the model.
        WeightsError: The weights file cannot be used.
        UnsupportedError: The example inputs are not tensors.
    """
    if fixed and dynamic:
        raise UsageError(f"--dynamic lets sizes vary, and {fixed} fixes them", hint="leave one of them out")
    weights = None if weights is None else Path(weights)
    if isinstance(model, str) and ":" not in model:
        if inputs is not None:
            raise UsageError(f"{model} is a registered model and has its own example inputs", hint="leave --inputs out")
        source = _registered(model, settings, weights, dynamic, batch_size, seed)
        return dataclasses.replace(source, dynamic={}, ranges={}) if fixed else source
    if settings:
        raise UsageError("--set is for registered models", hint="set these values where your callable makes the module")
    if batch_size is not None:
        raise UsageError("--batch-size is for registered models", hint="the batch size of your module is that of its example inputs")
    return _foreign(model, weights, inputs, dynamic)


def _registered(
    name: str, settings: Mapping[str, Any], weights: Path | None, dynamic: Sequence[Dynamic], batch_size: int | None, seed: int
) -> Source:
    entry = MODELS[name]
    try:
        spec = entry.spec(settings)
    except ValueError as error:
        raise UsageError(
            f"the settings of {name} contradict each other: {error}", hint="see the defaults with `isthmus list models --format json`"
        ) from error
    sizes = dict(spec.sizes)
    axes: dict[str, dict[int, str]] = {key: dict(value) for key, value in spec.dynamic.items()}
    ranges = dict(spec.ranges)
    if batch_size is not None:
        if "batch" not in sizes:
            raise UsageError(f"{name} has no batch size; its sizes are {', '.join(sizes) or 'none'}", hint="leave --batch-size out")
        # A batch size that is asked for is a fixed one.
        sizes["batch"] = batch_size
        axes = {key: {axis: size for axis, size in value.items() if size != "batch"} for key, value in axes.items()}
    for request in dynamic:
        size = spec.dynamic.get(request.input, {}).get(request.axis)
        if size is None:
            known = ", ".join(f"{key}:{axis}" for key, value in spec.dynamic.items() for axis in value) or "none"
            why = spec.fixed.get(request.input, {}).get(request.axis)
            what = f"axis {request.axis} of {request.input} cannot vary in {name}"
            raise UsageError(f"{what}: {why}" if why else what, hint=f"the axes that can: {known}")
        ranges[size] = request.range
        sizes[size] = max(2, request.range.opt)
        for key, value in spec.dynamic.items():  # the same size on other inputs varies with it
            axes.setdefault(key, {}).update({axis: named for axis, named in value.items() if named == size})
    axes = {key: value for key, value in axes.items() if value}
    used = {size for value in axes.values() for size in value.values()}
    module, info = _weighted(spec, name, settings, weights, seed)
    return Source(
        name=name,
        module=module,
        example=spec.inputs(np.random.Generator(np.random.PCG64(seed)), sizes),
        dynamic=axes,
        ranges={size: r for size, r in ranges.items() if size in used},
        sizes=sizes,
        config=dataclasses.asdict(dataclasses.replace(entry.config, **settings)),
        weights=info,
        spec=spec,
    )


def _weighted(spec: ModelSpec, name: str, settings: Mapping[str, Any], weights: Path | None, seed: int) -> tuple[nn.Module, WeightsInfo]:
    if weights is None and spec.weights is None:
        module = random_weights(spec, seed)
        return module, describe(module, origin="random", seed=seed)
    path = weights if weights is not None else spec.weights
    assert path is not None
    module = spec.build()
    try:
        return module, load_weights(module, path, spec.layouts, origin="shipped" if weights is None else "file")
    except IsthmusError as error:
        if weights is None and settings:
            raise UsageError(
                f"the weights that ship with {name} do not fit these settings",
                reasons=error.reasons,
                hint="give --weights that fit, or leave --set out",
            ) from error
        raise


def _foreign(
    model: Model, weights: Path | None, inputs: str | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None, dynamic: Sequence[Dynamic]
) -> Source:
    name = "module"
    if isinstance(model, str):
        name = model.rsplit(":", 1)[1]
        model = call_by_path(model)
    if isinstance(model, nn.Module):
        if inputs is None:
            raise UsageError(
                f"{name} gave a module without example inputs",
                hint="return a pair of module and tuple of tensors, or give --inputs module:callable",
            )
        module, example = model, call_by_path(inputs) if isinstance(inputs, str) else inputs
    elif isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module):
        module, example = model
        if inputs is not None:
            example = call_by_path(inputs) if isinstance(inputs, str) else inputs
    else:
        raise UsageError(
            f"{name} gave a {type(model).__name__}, expected an nn.Module or a pair of nn.Module and tuple of example inputs",
            hint="the callable takes no arguments and returns the module, with or without its example inputs",
        )
    module = module.eval()
    info = load_weights(module, weights, ()) if weights is not None else describe(module, origin="module")
    named = _named(module, example)
    axes: dict[str, dict[int, str]] = {}
    ranges: dict[str, SizeRange] = {}
    for request in dynamic:
        if request.input not in named:
            raise UsageError(f"--dynamic names the input {request.input}", hint=f"the inputs are {', '.join(named)}")
        if not 0 <= request.axis < named[request.input].ndim:
            raise UsageError(f"--dynamic names axis {request.axis} of {request.input}, which has shape {tuple(named[request.input].shape)}")
        # Every axis is a size of its own: torch.export finds out which of them have to be equal.
        axes.setdefault(request.input, {})[request.axis] = f"{request.input}_{request.axis}"
        ranges[f"{request.input}_{request.axis}"] = request.range
    return Source(name, module, named, axes, ranges, {}, {}, info, None)


def _named(module: nn.Module, example: object) -> dict[str, torch.Tensor]:
    keyword_only = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    if isinstance(example, Mapping) and (given := [name for name in keyword_only if name in example]):
        raise UnsupportedError(
            f"forward takes {', '.join(given)} by keyword only, and an exported graph has positional inputs",
            hint="wrap the module in one whose forward takes them by position",
        )
    if isinstance(example, torch.Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        order = [p for p in inspect.signature(module.forward).parameters if p in example]
        if set(order) != set(example):
            unknown = ", ".join(sorted(set(example) - set(order)))
            raise UsageError(
                f"the example inputs name {unknown}, which forward does not take", hint=f"forward takes {inspect.signature(module.forward)}"
            )
        taken = list(inspect.signature(module.forward).parameters)
        skipped = [name for name in taken[: taken.index(order[-1])] if name not in example] if order else []
        if skipped:
            raise UsageError(
                f"the example inputs skip {', '.join(skipped)}, and an exported graph has positional inputs",
                hint=f"give {', '.join(skipped)} too, or wrap the module in one whose forward takes only {', '.join(order)}",
            )
        pairs = [(key, example[key]) for key in order]
    elif isinstance(example, Sequence):
        try:
            bound = inspect.signature(module.forward).bind(*example)
        except TypeError as error:
            raise UsageError(f"the {len(example)} example inputs do not fit forward{inspect.signature(module.forward)}: {error}") from error
        pairs = []
        for key, value in bound.arguments.items():
            if isinstance(value, tuple) and inspect.signature(module.forward).parameters[key].kind is inspect.Parameter.VAR_POSITIONAL:
                pairs += [(f"{key}_{i}", item) for i, item in enumerate(value)]
            else:
                pairs.append((key, value))
    else:
        raise UsageError(f"the example inputs are a {type(example).__name__}, expected a tuple or dict of tensors")
    reasons = [
        Reason(f"is a {type(value).__name__}, expected a tensor", where=key, fix="wrap the module so that it takes tensors only")
        for key, value in pairs
        if not isinstance(value, torch.Tensor)
    ]
    if reasons:
        raise UnsupportedError("the example inputs are not all tensors", reasons=reasons)
    return dict(pairs)


def call_by_path(path: str) -> Any:
    """What `module:callable` gives when it is called without arguments; what it names, where that is no callable, or a module of torch.

    Raises:
        UsageError: There is no such module in the working folder or in this environment, or it has no such attribute.
        IsthmusError: Importing or calling it failed.
    """
    module_name, _, attribute = path.partition(":")
    # As `python -m` does: the user's file lies in the folder that the command is run in.
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise IsthmusError(f"importing {module_name} failed: {error}", hint=f"install {error.name} in this environment") from error
        raise UsageError(
            f"there is no Python module {module_name!r} here", hint="run the command in the folder of its file, or install it"
        ) from error
    except Exception as error:
        raise IsthmusError(f"importing {module_name} failed: {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(folder)
    for part in attribute.split("."):
        if not hasattr(found, part):
            import difflib

            near = difflib.get_close_matches(part, dir(found), n=3)
            raise UsageError(f"{module_name} has no {attribute!r}", hint=f"did you mean {' or '.join(near)}?" if near else "")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not isinstance(found, Callable):  # type: ignore[arg-type]  # a special form to mypy
        return found
    try:
        return found()
    except Exception as error:
        raise IsthmusError(
            f"calling {path} failed: {type(error).__name__}: {error}", hint="see its traceback with --log-level debug"
        ) from error
