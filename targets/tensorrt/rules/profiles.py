"""The sizes that an engine is compiled for."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from ....exporter.passes._rewrite import dims
from ....exporter.subject import Profile, Subject


@register_rule(
    "TRT-504",
    summary="profiles that do not cover the inputs",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="give the axis a range that covers the sizes, with --dynamic name:axis=min,opt,max",
    source="https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-dynamic-shapes.html",
)
def profiles(subject: Subject) -> Iterator[Match]:
    """An input with dynamic sizes has no profile, a profile is out of order, or a case that is measured lies outside."""
    if subject.profiles is None:
        return
    for value in subject.model.graph.inputs:
        name, shape = value.name or "", dims(value)
        profile = subject.profiles.get(name)
        if profile is None:
            if shape is None or not all(isinstance(d, int) for d in shape):
                yield Match("the input has dynamic sizes and no profile", where=name)
            continue
        if problem := _problem(profile, shape):
            yield Match(problem, where=name)
            continue
        for case, shapes in subject.cases.items():
            got = shapes.get(name)
            if got is not None and not _covers(profile, got):
                yield Match(f"the case {case} has shape {got}, the profile goes from {profile.min} to {profile.max}", where=name)


def _problem(profile: Profile, shape: list[int | str | None] | None) -> str:
    ranks = {len(profile.min), len(profile.opt), len(profile.max), *([len(shape)] if shape is not None else [])}
    if len(ranks) != 1:
        return "the profile and the input have different numbers of axes"
    if not all(1 <= low <= opt <= high for low, opt, high in zip(profile.min, profile.opt, profile.max, strict=True)):
        return f"the profile {profile.min}, {profile.opt}, {profile.max} is not of the form 1 <= min <= opt <= max"
    for axis, size in enumerate(shape or []):
        if isinstance(size, int) and {profile.min[axis], profile.max[axis]} != {size}:
            return f"axis {axis} is {size}, and the profile goes from {profile.min[axis]} to {profile.max[axis]}"
    return ""


def _covers(profile: Profile, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(profile.min) and all(
        low <= size <= high for low, size, high in zip(profile.min, shape, profile.max, strict=True)
    )
