"""What the report shows of a comparison module by module: the file `diff.json` of a bundle, and its charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..exporter.errors import IntegrityError
from ..exporter.manifest import Decibel
from .charts import Chart, Points, error_chart
from .wording import number

FILE = "diff.json"
MAX_BYTES = 256 * 2**20
"""Of the file."""

_FLOOR = 1e-9  # bars begin here at the lowest, two decades below float32's roundoff


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ErrorFigures(_Strict):
    """See `diff.Figures`."""

    relative_l2: Decibel
    sqnr_db: Decibel
    max_abs: Decibel
    problem: str = ""


class ModuleRow(_Strict):
    """See `diff.Row`."""

    module: str
    kind: str
    order: int
    total: ErrorFigures | None
    inherited: ErrorFigures | None
    injected: ErrorFigures | None
    at: str
    nodes: tuple[str, ...]
    reason: str
    case: str
    sensitivity: Decibel

    @property
    def name(self) -> str:
        """What people read: the outermost module has no path."""
        return self.module or "the whole model"

    def error(self, part: str) -> float | None:
        """The relative error `total`, `inherited` or `injected`; None where it is not known."""
        figures: ErrorFigures | None = getattr(self, part)
        return None if figures is None or math.isnan(figures.relative_l2) else figures.relative_l2


class StageModules(_Strict):
    """See `bisect.StageDiff`."""

    name: str
    precision: str
    threshold: float
    device: str
    reason: str
    visible: int
    over: tuple[str, ...]
    modules: tuple[ModuleRow, ...]

    @cached_property
    def shown(self) -> tuple[ModuleRow, ...]:
        """The modules with a figure, in the order in which errors were found."""
        return tuple(row for row in self.modules if row.total is not None or row.injected is not None)

    @property
    def hidden(self) -> dict[str, list[str]]:
        """The others, by the reason why they are not visible."""
        found: dict[str, list[str]] = {}
        for row in self.modules:
            if row.total is None and row.injected is None:
                found.setdefault(row.reason or "no figure", []).append(row.name)
        return found

    @cached_property
    def _scale(self) -> tuple[float, float]:
        """The logarithms between which bars lie."""
        errors = [e for row in self.shown for part in PARTS if (e := row.error(part)) is not None and math.isfinite(e)]
        low = math.floor(math.log10(max(_FLOOR, min((e for e in errors if e > 0), default=_FLOOR))))
        high = math.ceil(math.log10(max((*errors, self.threshold, _FLOOR))))
        return float(low), float(max(high, low + 1))

    def bar(self, error: float | None) -> float:
        """The length of an error's bar on a logarithmic scale, per cent."""
        if error is None or error <= 0:
            return 0.0
        low, high = self._scale
        return 100.0 if not math.isfinite(error) else min(100.0, max(1.0, 100 * (math.log10(error) - low) / (high - low)))

    @property
    def chart(self) -> Chart | None:
        """The errors against depth: the modules in the order in which their errors were found."""
        points = []
        for part in PARTS:
            values = []
            for i, row in enumerate(self.shown):
                error = row.error(part)
                if error:  # one of 0 has no logarithm
                    values.append((float(i), error, f"{row.name} ({row.kind})\n{part} {number(error)}"))
            points.append(Points(part, part, values, joined=part == "total"))
        title = f"Stage {self.name}: relative errors of {len(self.shown)} modules, in order"
        return error_chart(title, points, bound=self.threshold)


PARTS = ("inherited", "total", "injected")
"""The errors that are drawn, the last on top."""


class Culprit(_Strict):
    """The first module over the threshold, and its stage."""

    stage: str
    module: str


class TimestepRow(_Strict):
    """The relative errors of a module in one call of a trajectory; see `trajectory.against_timestep`."""

    timestep: Decibel
    module: str
    total: float | None
    inherited: float | None
    injected: float | None


class ModuleReport(_Strict):
    """The contents of `diff.json`.

    Attributes:
        culprit: The module that first went wrong; None where none did.
        arisen: Module to the stage in which its error arose.
        stages: What was found in each stage.
        timesteps: The errors along a trajectory, of the last stage that can be looked into.
        no_timesteps: Why there are none; empty where there are.
    """

    culprit: Culprit | None = None
    arisen: dict[str, str] = Field(default_factory=dict)
    stages: tuple[StageModules, ...]
    timesteps: tuple[TimestepRow, ...] = ()
    no_timesteps: str = ""

    @property
    def ran(self) -> list[StageModules]:
        """The stages with figures, the last first: it is nearest to the artifact."""
        return [stage for stage in reversed(self.stages) if stage.shown]

    @property
    def worst(self) -> ModuleRow | None:
        """The row of the culprit."""
        if self.culprit is None:
            return None
        rows = (row for stage in self.stages if stage.name == self.culprit.stage for row in stage.modules)
        return next((row for row in rows if row.module == self.culprit.module), None)

    @property
    def timestep_chart(self) -> Chart | None:
        """The error of the model's output, and the largest that a module injects, against the timestep."""
        output, injected = [], []
        for time, rows in _by_timestep(self.timesteps):
            if (whole := next((row for row in rows if not row.module), None)) and whole.total:
                output.append((time, whole.total, f"timestep {number(time)}\nerror of the output {number(whole.total)}"))
            known = [(row.injected, row.module or "the whole model") for row in rows if row.injected]
            if known:
                error, module = max(known)
                injected.append((time, error, f"timestep {number(time)}\n{module} injects {number(error)}"))
        title = "Relative errors along the sampler's trajectory, against the timestep"
        points = [Points("error of the output", "total", output), Points("largest that a module injects", "injected", injected)]
        return error_chart(title, points, across=number)


def _by_timestep(rows: Sequence[TimestepRow]) -> list[tuple[float, list[TimestepRow]]]:
    found: dict[float, list[TimestepRow]] = {}
    for row in rows:
        found.setdefault(row.timestep, []).append(row)
    return sorted(found.items())


def read_modules(folder: Path) -> ModuleReport | None:
    """The comparison that lies in a bundle; None where there is none.

    Raises:
        IntegrityError: The file is too large, leads out of the bundle, or is not what this version writes.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise IntegrityError(f"{FILE} leads out of {folder}", hint="export again")
    if path.stat().st_size > MAX_BYTES:
        raise IntegrityError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_BYTES}; it was not read")
    try:
        return ModuleReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise IntegrityError(
            f"{path} is no comparison of this version: {where}: {first['msg']}", hint="make it again: isthmus report BUNDLE --modules"
        ) from error
