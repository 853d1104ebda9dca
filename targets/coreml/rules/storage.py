"""States and files of weights."""

from __future__ import annotations

from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from .program import ProgramSubject

_GIB = 1 << 30
_LANES = 32


@register_rule(
    "ANE-601",
    summary="state whose last axis is no multiple of 32",
    effect="leaves the engine",
    targets=("coreml",),
    fix="pad the state's last axis to a multiple of 32",
    source="https://github.com/apple/coremltools/issues/2631",
    reads="mil",
    verdict="likely",
)
def state(subject: ProgramSubject) -> Iterator[Match]:
    """The engine fails to load such a state."""
    for name, sizes in subject.states():
        if sizes and sizes[-1] % _LANES:
            what = f"the state has the shape {sizes}, and its last axis is no multiple of {_LANES}"
            yield Match(what, where=name, name=name)


@register_rule(
    "ANE-602",
    summary="file of weights that is too large",
    effect="leaves the engine",
    targets=("coreml",),
    fix="compress the weights, or cut the model with --chunk-size",
    source="https://github.com/apple/ml-stable-diffusion: chunks below 1 GB for iOS; john-rocky/coreai-model-zoo: 2 GB on macOS",
    reads="mil",
    verdict="likely",
)
def large_file(subject: ProgramSubject) -> Iterator[Match]:
    """More than 1 GiB in a file for an iPhone or for any chip, more than 2 GiB for a Mac."""
    limit = 2 if subject.chip.startswith("M") else 1
    for package in subject.packages:
        for name, size in package.files.items():
            if size > limit * _GIB:
                yield Match(f"{size / _GIB:.2f} GiB of weights in a file, expected at most {limit}", where=name, name=name)
