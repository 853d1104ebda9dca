"""What of a model's behaviour, beside its numbers, survives in an artifact: `Analyser`, and the `register_analysis` decorator.

An analysis gives figures of PyTorch and of the artifact over the same inputs: the entropy of codes, the drift of an energy, the Betti
numbers of latents. It is one file in `calibration/analyses/`, and the decorator above its class is its registration. A model names the
analyses that suit it, with the outputs that they read, in `ModelSpec.analyses`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..exporter.registry import Registry
from ..exporter.spec import Analysis, Arrays

Run = Callable[[Arrays], Arrays]
"""One call of PyTorch or of the artifact."""


@dataclass(frozen=True)
class Figure:
    """A number that an analysis gives.

    Attributes:
        value: The number.
        unit: Its unit; empty for counts and shares.
        allowance: How far the artifact's may be from PyTorch's; None where it is for information only.
    """

    value: float
    unit: str = ""
    allowance: float | None = None


@dataclass(frozen=True)
class Seen:
    """What an analysis looks at: one side's calls over the same inputs.

    Attributes:
        inputs: The inputs of each call.
        outputs: Its outputs.
        reference: PyTorch's outputs; the same object as `outputs` on PyTorch's side.
        run: A further call of that side.
        fine: True where the side computes in float32 throughout, so that its figures are held to float32's rounding.
    """

    inputs: Sequence[Arrays]
    outputs: Sequence[Arrays]
    reference: Sequence[Arrays]
    run: Run
    fine: bool = True

    def output(self, name: str) -> np.ndarray[Any, Any]:
        """An output's rows of all calls, one below the other."""
        return np.concatenate([arrays[name] for arrays in self.outputs])

    def input(self, name: str) -> np.ndarray[Any, Any]:
        """The same of an input."""
        return np.concatenate([arrays[name] for arrays in self.inputs])

    def expected(self, name: str) -> np.ndarray[Any, Any]:
        """The same of an output of PyTorch's."""
        return np.concatenate([arrays[name] for arrays in self.reference])


class Analyser(ABC):
    """Gives the figures of one side.

    Attributes:
        name: The registered name.
        needs: Packages that it imports and that isthmus does without, by import name: the extra `analysis`.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def figures(self, request: Analysis, seen: Seen) -> Mapping[str, Figure]:
        """The figures by name, the same names for every side.

        Args:
            request: The outputs and inputs to read, and the settings.
            seen: What was computed.
        """


@dataclass(frozen=True)
class Finding:
    """One figure of PyTorch and of the artifact.

    Attributes:
        analysis: Registered name.
        of: The outputs that it was computed from.
        figure: Its name.
        unit: Its unit.
        reference: PyTorch's.
        artifact: The artifact's.
        allowance: See `Figure`.
    """

    analysis: str
    of: str
    figure: str
    unit: str
    reference: float
    artifact: float
    allowance: float | None

    @property
    def holds(self) -> bool:
        """False when the artifact's figure is further from PyTorch's than it may be, or is not a number."""
        if math.isnan(self.artifact) or math.isfinite(self.reference) != math.isfinite(self.artifact):
            return False
        return self.allowance is None or self.reference == self.artifact or abs(self.artifact - self.reference) <= self.allowance


def findings(request: Analysis, reference: Seen, artifact: Seen) -> list[Finding]:
    """What an analysis says of both sides.

    Args:
        request: What to analyse.
        reference: PyTorch's calls.
        artifact: The artifact's. Where its outputs have no such figures, because they are not finite or codes that do not exist, each is
            not a number, which never holds.

    Raises:
        ValueError: The request names outputs, inputs or settings that do not fit the analysis, or PyTorch's outputs have no such figures.
    """
    analyser = ANALYSES[request.name]()
    ours = analyser.figures(request, reference)
    try:
        # The libraries behind the analyses refuse such numbers, or warn of them, each in its own way.
        theirs = dict(analyser.figures(request, artifact)) if _finite(request, artifact) else {}
    except ValueError:  # the request is one that suits the model: PyTorch's side has just said so
        theirs = {}
    of = ", ".join((*request.inputs, *request.outputs))
    found = []
    for name, figure in ours.items():
        its = theirs.get(name, replace(figure, value=math.nan))
        found.append(Finding(request.name, of, name, figure.unit, figure.value, its.value, its.allowance))
    return found


def _finite(request: Analysis, seen: Seen) -> bool:
    return all(
        np.isfinite(arrays[name]).all()
        for arrays in seen.outputs
        for name in (request.outputs or arrays)
        if arrays[name].dtype.kind in "fc"
    )


ANALYSES: Registry[type[Analyser]] = Registry("analysis", "calibration/analyses", "register_analysis")

A = TypeVar("A", bound=type[Analyser])


def register_analysis(name: str, *, summary: str) -> Callable[[A], A]:
    """Registers an analysis. Both arguments must be literals (see `exporter.registry`)."""
    del summary  # read from the source

    def decorate(analyser: A) -> A:
        analyser.name = name
        ANALYSES.register(name, analyser)
        return analyser

    return decorate
