"""What the report shows of a search for a mixed precision: the file `tune.json` of a bundle, and its plot of Pareto."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..exporter.errors import IntegrityError, Reason
from ..exporter.manifest import Column, Decibel, Manifest, Table
from .charts import Chart, Points, scatter_chart
from .wording import cell, decibel, number

FILE = "tune.json"
MAX_BYTES = 64 * 2**20
"""Of the file."""


class _Read(BaseModel):
    # What a search says beyond this is not shown: the file is the search's own, not the report's.
    model_config = ConfigDict(extra="ignore", frozen=True)


class TunePoint(_Read):
    """A choice of modules that was measured; see `tuning.Point`."""

    flop_share: float
    sqnr_db: Decibel
    psnr_db: Decibel | None = None
    lpips_style: float | None = None


class TuneBudget(_Read):
    """How much accuracy was asked for."""

    min_sqnr_db: float | None = None
    min_psnr_db: float | None = None
    max_lpips_style: float | None = None


class TuneModule(_Read):
    """A module: its operations, what quantising it alone leaves of the output and of the pictures, and whether it was chosen."""

    module: str
    flops: int
    sqnr_db: Decibel
    psnr_db: Decibel | None = None
    lpips_style: float | None = None
    chosen: bool


class TuneReport(_Read):
    """What `isthmus tune` writes beside a recipe, in `NAME.pareto.json`; `recipe` is the recipe's sha256, empty in files that have none."""

    model: str
    weights: str
    target: str
    precision: str
    recipe: str = ""
    budget: TuneBudget
    chosen: TunePoint
    uniform: TunePoint
    front: tuple[TunePoint, ...]
    points: tuple[TunePoint, ...]
    modules: tuple[TuneModule, ...]

    @property
    def chart(self) -> Chart:
        """SQNR against the share of operations in the low precision: to the right and above is better."""

        def place(point: TunePoint, what: str) -> tuple[float, float, str]:
            drawn = f", pictures {decibel(point.psnr_db)} dB" if point.psnr_db is not None else ""
            drawn += f", LPIPS-style {number(point.lpips_style)}" if point.lpips_style is not None else ""
            return (
                point.flop_share,
                point.sqnr_db,
                f"{what}\n{cell(point.flop_share, 'share')} of the operations in {self.precision}\nSQNR {decibel(point.sqnr_db)} dB{drawn}",
            )

        points = [
            Points("measured", "inherited", [place(p, "measured") for p in self.points], joined=False),
            Points("front of Pareto", "total", sorted(place(p, "front of Pareto") for p in self.front)),
            Points("every module, by the largest value", "injected", [place(self.uniform, "every module, by the largest value")]),
            Points("chosen", "verified", [place(self.chosen, "chosen")]),
        ]
        title = f"SQNR against the share of operations in {self.precision}, of {len(self.points)} choices of modules"
        return scatter_chart(title, points, bound=self.budget.min_sqnr_db)

    @property
    def table(self) -> Table:
        """The modules, each with what is left when it alone is quantised. Figures of pictures are there where some were measured."""
        figures = [Column(name="SQNR alone, dB", kind="decibel")]
        names = ["sqnr_db"]
        if any(m.psnr_db is not None for m in self.modules):
            figures, names = [*figures, Column(name="PSNR of pictures alone, dB", kind="decibel")], [*names, "psnr_db"]
        if any(m.lpips_style is not None for m in self.modules):
            figures, names = [*figures, Column(name="LPIPS-style alone", kind="number")], [*names, "lpips_style"]
        return Table(
            name="tune",
            title="Modules that were tried",
            columns=(
                Column(name="PyTorch module", kind="code"),
                Column(name="FLOPs", kind="count"),
                *figures,
                Column(name=f"In {self.precision}"),
            ),
            rows=tuple((m.module, m.flops, *(getattr(m, name) for name in names), "yes" if m.chosen else "no") for m in self.modules),
        )

    def recipe_note(self, options: Mapping[str, Any]) -> str:
        """What people have to know of the recipe of a bundle that shows this search; empty where it is the one that was found.

        Args:
            options: Those of the bundle's export, with the recipe's sha256 as `recipe` where there was one.
        """
        used = options.get("recipe")
        if used is None:
            return "This bundle was exported without the recipe of this search: what was chosen here says nothing of its modules."
        if not self.recipe:
            return "This search does not say which recipe it wrote, so that it is not known whether the bundle was exported with it."
        if used != self.recipe:
            return (
                "This bundle was not exported with the recipe of this search, but with another one "
                f"(sha256 {str(used)[:12]}…, the search wrote {self.recipe[:12]}…): what was chosen here says nothing of its modules."
            )
        return ""

    def misfits(self, manifest: Manifest) -> list[Reason]:
        """Why this is no search for a bundle's model; empty when it is."""
        pairs = {
            "model": (self.model, manifest.model),
            "weights": (self.weights, manifest.weights.sha256),
            "target": (self.target, manifest.target),
            "precision": (self.precision, manifest.precision),
        }
        return [
            Reason(f"the search was for {got}, the bundle is {expected}", where=k)
            for k, (got, expected) in pairs.items()
            if got != expected
        ]


def read_tune(path: Path) -> TuneReport:
    """Reads what a search found.

    Raises:
        IntegrityError: The file cannot be read, is too large, or is none of `isthmus tune`.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise IntegrityError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_BYTES}; it was not read")
        return TuneReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise IntegrityError(
            f"{path} is not what `isthmus tune` writes: {where}: {first['msg']}", hint="give its NAME.pareto.json"
        ) from error


def tune_of(folder: Path) -> TuneReport | None:
    """The search that lies in a bundle; None where there is none.

    Raises:
        IntegrityError: See `read_tune`; or the file leads out of the bundle.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise IntegrityError(f"{FILE} leads out of {folder}", hint="export again")
    return read_tune(path)
