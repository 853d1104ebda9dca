"""Where calibration inputs come from: files, a callable, real sampling trajectories, or random numbers when asked for in that word."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..exporter.errors import Reason, UsageError
from ..exporter.preprocess import Preprocess
from ..exporter.spec import Arrays, Sampler
from .files import MAX_SETS, Expected, called_sets, is_callable_path, read_sets, tried

RANDOM = "random"
TRAJECTORIES = "trajectories"
DEFAULT_SIZE = 32
"""Sets of inputs, when `--calibration-size` does not say."""


@dataclass(frozen=True)
class CalibrationData:
    """Sets of inputs to observe a model on.

    Attributes:
        source: `trajectories`, `random`, or the name of the file, folder or callable.
        sets: One call of the model each: inputs by name.
        timestep: The name of the input that holds the timestep of each row; empty where there is none.
    """

    source: str
    sets: Sequence[Arrays]
    timestep: str = ""

    @property
    def rows(self) -> int:
        """The rows of all sets together, by the first axis of their first input."""
        return sum(first.shape[0] if (first := next(iter(arrays.values()))).ndim else 1 for arrays in self.sets if arrays)

    def times(self, index: int) -> np.ndarray[Any, Any] | None:
        """The timesteps (rows,) of a set; None where there are none."""
        times = self.sets[index].get(self.timestep)
        return times if times is not None and times.ndim == 1 and times.size and np.isfinite(times).all() else None

    def summary(self) -> dict[str, object]:
        """What the data is, as JSON values for the manifest."""
        return {"source": self.source, "size": len(self.sets), "rows": self.rows, "sha256": self.sha256()}

    def sha256(self) -> str:
        """Of the names, shapes and bytes of all inputs, in order."""
        digest = hashlib.sha256()
        for arrays in self.sets:
            for name, array in arrays.items():
                digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def given_data(
    text: str | None,
    *,
    example: Arrays,
    dynamic: Mapping[str, Collection[int]],
    sampler: Sampler | None,
    draw: Callable[[np.random.Generator], Arrays],
    seed: int,
    size: int | None = None,
    timestep: str = "",
    preprocess: Preprocess | None = None,
    run: Callable[[Arrays], object] | None = None,
) -> CalibrationData | None:
    """The calibration inputs that a call names, read and checked; None for those that the model's own trajectories are to give.

    Args:
        text: `random`; an `.npz` or `.safetensors` file, or a folder of them or of pictures; `module:callable`; or None for the model's own
            trajectories. See `files.read_sets` and `files.called_sets`.
        example: Example inputs, for names, dtypes and shapes.
        dynamic: For each input, the axes that may have another size than the example's.
        sampler: How pictures are drawn with trained weights; None where there is no such thing.
        draw: Draws one set of random inputs.
        seed: Seed of what is drawn.
        size: Number of sets; of a file's, the first so many.
        timestep: The name of the input that holds the timestep, where the model has one.
        preprocess: What becomes of pictures.
        run: One call of the model, to see whether it takes what is given (see `files.tried`); None not to try.

    Raises:
        UsageError: There is no data and nothing to take it from, or it does not fit the model, or the model fails on it; see
            `files.read_sets` and `files.tried` for what is listed.
        IntegrityError: A file is damaged.
        IsthmusError: The callable fails.
    """
    if text == RANDOM:
        sets = [draw(np.random.Generator(np.random.PCG64([seed, i]))) for i in range(size or DEFAULT_SIZE)]
        return CalibrationData(RANDOM, sets, timestep)
    expected = Expected(example, {name: tuple(axes) for name, axes in dynamic.items()})
    if text is not None:
        if called := is_callable_path(text):
            found = called_sets(text, expected, size or DEFAULT_SIZE)
        else:
            found = read_sets(Path(text), expected, size or MAX_SETS, preprocess)
        if run is not None:
            tried(found, example, run, text)
        return CalibrationData(text if called else Path(text).name, [arrays for _, arrays in found], timestep)
    if sampler is None:
        raise UsageError(
            "this precision needs calibration data, and the model has no trained weights to draw it with",
            hint="give --calibration-data FILE (.npz or .safetensors, inputs by name or set/name), a folder of such files or of pictures, "
            "or module:callable; `--calibration-data random` calibrates on random inputs, and the report says so",
        )
    return None


def trajectory_data(
    sampler: Sampler, run: Callable[[Arrays], Arrays], *, example: Arrays, seed: int, size: int | None = None, timestep: str = ""
) -> CalibrationData:
    """What the model sees while it draws pictures; every set covers the whole trajectory.

    Args:
        sampler: How pictures are drawn.
        run: One call of the PyTorch model.
        example: Example inputs, for the number of rows.
        seed: Seed of the starting noise and of the choice of rows.
        size: Number of sets.
        timestep: See `given_data`.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    rows = next(iter(example.values())).shape[0]
    return CalibrationData(TRAJECTORIES, list(sampler.calibration_inputs(run, rng, size=size or DEFAULT_SIZE, batch=rows)), timestep)


def check_size(size: int | None) -> None:
    """Refuses a `--calibration-size` that makes no sense.

    Raises:
        UsageError: It is below 1 or above 65536.
    """
    if size is not None and not 1 <= size <= MAX_SETS:
        raise UsageError(f"--calibration-size: got {size}, expected 1 to {MAX_SETS}")


def check_preprocess(text: str | None, preprocess: Preprocess | None) -> None:
    """Refuses pictures without a preprocessing line, and a line without pictures, before anything is read.

    Raises:
        UsageError: One of the two is given without the other.
    """
    from .files import holds_pictures

    pictures = text is not None and text != RANDOM and holds_pictures(Path(text))
    if preprocess is not None and not pictures:
        raise UsageError(
            "--calibration-preprocess is for a folder of pictures", hint="leave it out, or give the folder as --calibration-data"
        )
    if pictures and preprocess is None:
        raise UsageError(
            f"--calibration-data: {text} holds pictures, and it is not said how they become an input",
            reasons=[Reason("--calibration-preprocess is missing")],
            hint="for example --calibration-preprocess 'input=x,resize=256,crop=256,mean=0.5,std=0.5'",
        )
