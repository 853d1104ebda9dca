"""What the report shows of `isthmus verify --analysis`: the file `analyses.json` of a bundle, and its table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ..exporter.errors import IntegrityError
from ..exporter.manifest import Decibel
from .analysis import Finding

FILE = "analyses.json"
MAX_BYTES = 4 * 2**20
"""Of the file."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AnalysisRow(_Strict):
    """See `analysis.Finding`."""

    analysis: str
    of: str
    figure: str
    unit: str
    reference: Decibel
    artifact: Decibel
    allowance: float | None
    holds: bool


class AnalysisReport(_Strict):
    """The contents of `analyses.json`.

    Attributes:
        stage: The stage whose artifact was executed.
        device: What executed it.
        rows: Rows of the batch dimension that were drawn, or calls where there is none.
        seed: Of their drawing.
        figures: What was found.
    """

    stage: str
    device: str
    rows: int
    seed: int
    figures: tuple[AnalysisRow, ...]

    @property
    def missed(self) -> list[AnalysisRow]:
        """The figures that are further from PyTorch's than they may be."""
        return [row for row in self.figures if not row.holds]


def report_of(found: Iterable[Finding], *, stage: str, device: str, rows: int, seed: int) -> AnalysisReport:
    """The contents of the file."""
    figures = tuple(AnalysisRow(**asdict(finding), holds=finding.holds) for finding in found)
    return AnalysisReport(stage=stage, device=device, rows=rows, seed=seed, figures=figures)


def read_analyses(folder: Path) -> AnalysisReport | None:
    """What a bundle holds; None where nothing was analysed.

    Raises:
        IntegrityError: The file is not what this version writes, or leads out of the bundle.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()) or path.stat().st_size > MAX_BYTES:
        raise IntegrityError(f"{path} leads out of the bundle or is too large", hint="run `isthmus verify --analysis` again")
    try:
        return AnalysisReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise IntegrityError(f"{path} cannot be used: {error}", hint="run `isthmus verify --analysis` again") from error
