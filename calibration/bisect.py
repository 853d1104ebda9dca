"""Which module first went wrong, and in which stage of its way from PyTorch to the artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..exporter.errors import IsthmusError, MachineError
from ..exporter.flow import Values
from ..exporter.spec import Arrays
from .diff import MEMORY, Reference, diff
from .row import Row, merged, over, threshold_of

HALF = 0.5
"""An error is said to arise in the first stage that has this much of what the stages have at most."""


@dataclass(frozen=True)
class Form:
    """A form that the program takes on its way, and how to look into it.

    Attributes:
        name: One of the bundle's stage names: `torch-dtype`, `onnx`, `native`, `quantized`, `mil`, `coreai`, `plan`, `device`.
        precision: What it computes in.
        open: Opens it, or None when this machine cannot.
        reason: Why it cannot; empty when it can.
        threshold: The relative error above which a module has gone wrong; None for that of the precision.
    """

    name: str
    precision: str
    open: Callable[[], Values] | None
    reason: str = ""
    threshold: float | None = None

    @property
    def bound(self) -> float:
        """The relative error above which a module has gone wrong."""
        return threshold_of(self.precision) if self.threshold is None else self.threshold


@dataclass(frozen=True)
class StageDiff:
    """What was found in one form of the program.

    Attributes:
        name: The stage's name.
        precision: What it computes in.
        threshold: The relative error above which a module has gone wrong.
        rows: Of every call of a module, in the order in which the errors were found; empty when it was not run.
        device: What executed it.
        reason: Why it was not run; empty when it was.
    """

    name: str
    precision: str
    threshold: float
    rows: tuple[Row, ...] = ()
    device: str = ""
    reason: str = ""

    @property
    def over(self) -> list[Row]:
        """The modules over the threshold, the first first."""
        return over(self.rows, self.threshold)

    @property
    def worst(self) -> Row | None:
        """The module that injects most."""
        return max((row for row in self.rows if row.injected is not None), key=lambda row: row.error, default=None)

    def value(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "precision": self.precision,
            "threshold": self.threshold,
            "device": self.device,
            "reason": self.reason,
            "visible": sum(row.visible for row in self.rows),
            "over": [row.module for row in self.over],
            "modules": [row.value() for row in self.rows],
        }


@dataclass(frozen=True)
class Culprit:
    """The module that first went wrong.

    Attributes:
        stage: The first stage with a module over the threshold.
        row: The first such module in it.
    """

    stage: StageDiff
    row: Row

    def value(self) -> dict[str, Any]:
        """As JSON values."""
        return {"stage": self.stage.name, "threshold": self.stage.threshold, **self.row.value()}


def examine(
    reference: Reference, form: Form, cases: Mapping[str, Arrays], *, threshold: float | None = None, memory: int = MEMORY
) -> StageDiff:
    """Compares one form of the program with PyTorch, module by module, over all cases.

    Args:
        reference: The PyTorch module.
        form: The form.
        cases: The inputs of each case.
        threshold: The relative error above which a module has gone wrong; that of the form by default.
        memory: See `diff`.

    Raises:
        IsthmusError: PyTorch fails, or the form does where it can be opened.
    """
    bound = form.bound if threshold is None else threshold
    found = StageDiff(form.name, form.precision, bound, reason=form.reason)
    if form.open is None:
        return found
    try:
        with form.open() as values:
            rows = [diff(reference, values, inputs, threshold=bound, memory=memory, case=case) for case, inputs in cases.items()]
            return dataclasses.replace(found, rows=tuple(merged(rows)), device=values.device)
    except MachineError as error:
        return dataclasses.replace(found, reason=error.message)
    except IsthmusError as error:
        raise IsthmusError(f"stage {form.name}: {error.message}", hint=error.hint, reasons=error.reasons) from error


def culprit(stages: Sequence[StageDiff]) -> Culprit | None:
    """The module that first went wrong, in the first stage in which one did; None when none did."""
    return next((Culprit(stage, stage.over[0]) for stage in stages if stage.over), None)


def arisen(stages: Sequence[StageDiff]) -> dict[str, str]:
    """In which stage each module's error arose: the first that injects at least half of what the stages inject there at most.

    Args:
        stages: In order.

    Returns:
        Module to the stage's name, for modules that are visible in one.
    """
    errors: dict[str, dict[str, float]] = {}
    for stage in stages:
        for row in stage.rows:
            if row.injected is not None:
                errors.setdefault(row.module, {})[stage.name] = row.error
    return {module: next(name for name, error in found.items() if error >= HALF * max(found.values())) for module, found in errors.items()}
