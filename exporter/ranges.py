"""What was observed of a model's activations on calibration data, and what follows from it: the table that every target reads.

The table is the file `calibration.json` of a bundle. Its text is a function of the model, the data and the method: it holds no time, no
path and no version of a tool, and two runs with one seed give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import IntegrityError, IsthmusError, Reason
from .grids import GRIDS, Interval

FILE = "calibration.json"
"""The table in a bundle."""

SCHEMA_VERSION = 1

MAX_BYTES = 64 * 2**20
"""Of a table's file."""

Number = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Bounds(_Strict):
    """The values that are represented on a grid; the others saturate.

    Attributes:
        low: The smallest, at most 0; `-high` on symmetric grids.
        high: The largest, at least 0.
    """

    low: Annotated[Number, Field(le=0)]
    high: Annotated[Number, Field(ge=0)]


class Bins(_Strict):
    """A histogram in few bins.

    Attributes:
        exponent: Bins are `2 ** exponent` wide and aligned to 0.
        first: Index of the first bin: it begins at `first * 2 ** exponent`.
        counts: How many values each bin holds.
    """

    exponent: int
    first: int
    counts: tuple[Annotated[int, Field(ge=0)], ...]


class Period(_Strict):
    """What was seen of a value at some of the timesteps.

    Attributes:
        start: The smallest timestep of the period, in the unit of the model's input.
        stop: The timestep behind its end.
        rows: How many rows were seen in it.
        min: The smallest value in them.
        max: The largest.
    """

    start: Number
    stop: Number
    rows: Annotated[int, Field(ge=1)]
    min: Number
    max: Number

    @property
    def amax(self) -> float:
        """The largest |value|."""
        return max(-self.min, self.max)


class Observed(_Strict):
    """What was seen of one value of the graph.

    Attributes:
        module: The PyTorch module whose layer reads it first, or the one that computes it; empty where that is not known.
        count: How many numbers were seen.
        min: The smallest.
        max: The largest.
        percentiles: The share of |numbers| in percent to what they do not exceed, up to the width of a bin; as texts, because JSON's keys
            are.
        histogram: Where the numbers lie.
        ranges: What is represented, by the name of a grid (`exporter.grids`).
        periods: By timestep; empty where rows are no samples or the model has no timestep.
        drift: The largest |value| of a period over the smallest that is not 0, where there are periods: 1 for what is equally large at all
            times. One scale serves all timesteps: where the drift is 8, those of the smallest values have 3 bits less of an integer grid.
    """

    module: str = ""
    count: Annotated[int, Field(ge=0)]
    min: Number
    max: Number
    percentiles: dict[str, Number] = {}
    histogram: Bins | None = None
    ranges: dict[str, Bounds]
    periods: tuple[Period, ...] = ()
    drift: Number | None = None

    @property
    def amax(self) -> float:
        """The largest |number|."""
        return max(-self.min, self.max)


class DataInfo(_Strict):
    """The calibration data.

    Attributes:
        source: `trajectories` (what the model sees while it samples, with its trained weights), `random`, or the name of a file, a folder
            or a callable.
        sets: Number of sets of inputs, one call of the model each.
        rows: Number of rows in all of them.
        sha256: Of the inputs' names, types, shapes and bytes.
    """

    source: str
    sets: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)] = 0
    sha256: str = ""


class CalibrationTable(_Strict):
    """The ranges of a model's activations, and where they come from.

    Attributes:
        schema_: Version of this layout (`schema` in the file).
        model: The model's name.
        weights: sha256 of its weights.
        method: The calibrator's registered name.
        seed: Of what was drawn.
        data: The data.
        timestep: The name of the input that holds the timestep; empty where there is none.
        values: What was seen, by the name of a value of the float32 ONNX graph.
    """

    schema_: Literal[1] = Field(default=1, alias="schema", serialization_alias="schema")
    model: str = ""
    weights: str = ""
    method: str
    seed: int = 0
    data: DataInfo
    timestep: str = ""
    values: dict[str, Observed]

    @staticmethod
    def of_ranges(ranges: Mapping[str, float], *, grid: str = "e4m3", source: str = "given") -> CalibrationTable:
        """A table that says no more than the largest |value| to represent of every value, by name."""
        return CalibrationTable(
            method="max",
            data=DataInfo(source=source, sets=0),
            values={
                name: Observed(count=0, min=-amax, max=amax, ranges={grid: Bounds(low=-amax, high=amax)}) for name, amax in ranges.items()
            },
        )

    @property
    def random(self) -> bool:
        """Whether the data says nothing of what the model will see."""
        return self.data.source == "random"

    def interval(self, name: str, grid: str) -> Interval:
        """What is represented of a value on a grid.

        Raises:
            IsthmusError: The table has no such value, or not for this grid.
        """
        bounds = self.values[name].ranges.get(grid) if name in self.values else None
        if bounds is None:
            raise IsthmusError(f"the calibration has no range of {name} for {grid}", hint="calibrate again for this model")
        return Interval(bounds.low, bounds.high)

    def ranges(self, grid: str) -> dict[str, float]:
        """The largest |value| to represent on a grid, of every value that has one for it, by name."""
        return {name: bounds.high for name, seen in self.values.items() if (bounds := seen.ranges.get(grid)) and GRIDS[grid].symmetric}

    def require(self, names: Sequence[str], grids: Sequence[str]) -> None:
        """Refuses a table that lacks what an export reads.

        Raises:
            IsthmusError: Values or grids are missing; all are listed.
        """
        reasons = [Reason("is not in the table", where=name) for name in names if name not in self.values]
        reasons += [
            Reason(f"has no range for {grid}, only for {', '.join(self.values[name].ranges) or 'none'}", where=name)
            for name in names
            if name in self.values
            for grid in grids
            if grid not in self.values[name].ranges
        ]
        if reasons:
            raise IsthmusError("the calibration table is of another model", reasons=reasons, hint="calibrate the model that is exported")

    def json_text(self) -> str:
        """The file's text, with a line for each value."""
        head = self.model_dump(mode="json", by_alias=True, exclude={"values"})
        lines = [f"{json.dumps(name)}: {json.dumps(seen.model_dump(mode='json'))}" for name, seen in self.values.items()]
        return json.dumps(head)[:-1] + ', "values": {\n' + ",\n".join(lines) + "\n}}\n"

    def sentence(self) -> str:
        """Method and data, for the report."""
        method = "the largest |value|" if self.method == "max" else f"by the method {self.method}"
        source = {"trajectories": "inputs seen while sampling", "random": "random inputs"}.get(self.data.source, self.data.source)
        return f"ranges: {method} over {self.data.sets} sets of {source}"

    def summary(self) -> dict[str, object]:
        """Method and data, as JSON values for the manifest."""
        return {
            "method": self.method,
            "source": self.data.source,
            "size": self.data.sets,
            "rows": self.data.rows,
            "sha256": self.data.sha256,
        }


def read_table(path: Path) -> CalibrationTable:
    """Reads a table.

    Raises:
        IntegrityError: The file is no table of this version, or cannot be read.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise IntegrityError(f"{path} is larger than {MAX_BYTES} bytes and was not read")
        return CalibrationTable.model_validate_json(path.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise IntegrityError(
            f"{path} is no calibration table of schema {SCHEMA_VERSION}: {where}: {first['msg']}", hint="calibrate again with this version"
        ) from error
