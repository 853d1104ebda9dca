"""What the arguments of an export stand for: names, choices with their defaults, and bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from isthmus.calibrating import sampler_of
from isthmus.calibration.metrics import DEFAULT_TOLERANCES
from isthmus.exporter.errors import UnknownNameError, UsageError
from isthmus.exporter.sampling import GraphSampler
from isthmus.exporter.source import Model, Source
from isthmus.exporter.spec import Tolerance
from isthmus.exporter.target import Target


def name_of(model: Model) -> str:
    """What a model is called: its registered name, the callable's, or the module's class."""
    if isinstance(model, str):
        return model.rsplit(":", 1)[-1]
    return type(model[0] if isinstance(model, tuple) else model).__name__


def choose(kind: str, value: Any, allowed: Sequence[Any]) -> Any:
    """A value that is allowed; the first of them where none was given.

    Raises:
        UnknownNameError: It is none of them.
    """
    if value is None:
        return allowed[0]
    if value not in allowed:
        raise UnknownNameError(kind, str(value), [str(a) for a in allowed])
    return value


def choose_opset(target: Target[Any], opset: int | None) -> int | None:
    """The opset of the ONNX graph; None for a target that is not lowered from one.

    Raises:
        UnknownNameError: The target does not take it.
        UsageError: The target has no use for it.
    """
    if target.opsets:
        return int(choose("opset", opset, target.opsets))
    if opset is not None:
        raise UsageError(f"{target.name} is lowered from the PyTorch program, not from ONNX, so --opset has no use", hint="leave it out")
    return None


def graph_sampler(source: Source) -> GraphSampler:
    """The model's sampler, which has to be one that can be written as a graph.

    Raises:
        UsageError: It has none.
    """
    if isinstance(sampler := sampler_of(source), GraphSampler):
        return sampler
    raise UsageError(
        f"--sampler loop writes a model's sampler as a graph, and {source.name} comes without one",
        hint="that needs a registered model that has a sampler, its trained weights, and a batch of the sampler's size",
    )


def tolerance_of(
    source: Source, target: Target[Any], precision: str, atol: float | None, rtol: float | None, min_psnr: float | None
) -> Tolerance:
    """The bounds of a precision: the model's own, else the target's, else the usual ones, with what was asked for in their place."""
    base = {**DEFAULT_TOLERANCES, **target.tolerances, **(source.spec.tolerances if source.spec else {})}[precision]
    if atol is not None or rtol is not None:
        base = dataclasses.replace(base, max_relative=None, atol=atol or 0.0, rtol=rtol or 0.0)
    return base if min_psnr is None else dataclasses.replace(base, min_psnr=min_psnr)
