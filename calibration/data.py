"""Where calibration inputs come from: files, real sampling trajectories, or random numbers when they are asked for in that word."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..exporter.bundle import read_cases
from ..exporter.errors import IntegrityError, IsthmusError, Reason, UsageError
from ..exporter.spec import Arrays, Sampler

RANDOM = "random"
DEFAULT_SIZE = 32
"""Sets of inputs, when `--calibration-size` does not say."""

MAX_SIZE = 2**16


@dataclass(frozen=True)
class CalibrationData:
    """Sets of inputs to observe a model on.

    Attributes:
        source: `trajectories`, `random`, or the name of the file or folder.
        sets: One call of the model each: inputs by name.
    """

    source: str
    sets: Sequence[Arrays]

    def sha256(self) -> str:
        """Of the names, shapes and bytes of all inputs, in order."""
        digest = hashlib.sha256()
        for arrays in self.sets:
            for name, array in arrays.items():
                digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def calibration_data(
    text: str | None,
    *,
    example: Arrays,
    dynamic: Mapping[str, Collection[int]],
    sampler: Sampler | None,
    run: Callable[[Arrays], Arrays],
    draw: Callable[[np.random.Generator], Arrays],
    seed: int,
    size: int | None = None,
) -> CalibrationData:
    """The calibration inputs that a call asks for.

    Args:
        text: `random`, an `.npz` file or a folder of them, or None for the model's own trajectories. A file has one set of inputs under
            their names, or several under `set/name`.
        example: Example inputs, for names, dtypes and shapes.
        dynamic: For each input, the axes that may have another size than the example's.
        sampler: How pictures are drawn with trained weights; None where there is no such thing.
        run: One call of the PyTorch model, for the trajectories.
        draw: Draws one set of random inputs.
        seed: Seed of what is drawn.
        size: Number of sets; of a file's, the first so many.

    Raises:
        UsageError: There is no data and nothing to take it from, or the files do not fit the model; all faults are listed.
        IntegrityError: A file is damaged.
    """
    count = size or DEFAULT_SIZE
    if text == RANDOM:
        return CalibrationData(RANDOM, [draw(np.random.Generator(np.random.PCG64([seed, i]))) for i in range(count)])
    if text is not None:
        return CalibrationData(Path(text).name, _checked(list(_read(Path(text))), example, dynamic, text)[: size or MAX_SIZE])
    if sampler is None:
        raise UsageError(
            "this precision needs calibration data, and the model has no trained weights to draw it with",
            hint="give --calibration-data FILE.npz (inputs by name, or set/name) or a folder of such files; `--calibration-data random` "
            "calibrates on random inputs, and the report says so",
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    rows = next(iter(example.values())).shape[0]
    return CalibrationData("trajectories", list(sampler.calibration_inputs(run, rng, size=count, batch=rows)))


def _read(path: Path) -> Iterator[tuple[str, Arrays]]:
    if not path.exists():
        raise UsageError(f"--calibration-data: {path} does not exist", hint="give an .npz file, a folder of them, or the word random")
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"--calibration-data: the folder {path} holds no .npz file", hint="write them with numpy.savez")
    for file in files:
        try:
            cases = read_cases(file)
        except IntegrityError as error:
            raise IntegrityError(error.message, hint="write it with numpy.savez, inputs by name or set/name") from error
        flat = {name: arrays[""] for name, arrays in cases.items() if set(arrays) == {""}}  # no slash in the key
        yield from ((f"{file.name}, {name}", arrays) for name, arrays in cases.items() if name not in flat)
        if flat:
            yield file.name, flat


def _checked(sets: list[tuple[str, Arrays]], example: Arrays, dynamic: Mapping[str, Collection[int]], text: str) -> Sequence[Arrays]:
    reasons = []
    for where, arrays in sets:
        reasons += [Reason("is missing", f"{where}: {name}") for name in example if name not in arrays]
        reasons += [
            Reason(f"is no input; the inputs are {', '.join(example)}", f"{where}: {name}") for name in arrays if name not in example
        ]
        reasons += [
            Reason(fault, f"{where}: {name}")
            for name, array in arrays.items()
            if name in example and (fault := _fault(array, example[name], dynamic.get(name, ())))
        ]
    if reasons:
        raise UsageError(f"--calibration-data: {text} does not fit the model", reasons=reasons[:20])
    return [{name: arrays[name] for name in example} for _, arrays in sets]


def _fault(array: np.ndarray[Any, Any], like: np.ndarray[Any, Any], free: Collection[int]) -> str:
    if array.dtype != like.dtype:
        return f"has dtype {array.dtype}, expected {like.dtype}"
    expected = [None if i in free else size for i, size in enumerate(like.shape)]
    fits = array.ndim == like.ndim and all(e in (None, s) for e, s in zip(expected, array.shape, strict=True))
    if not fits or not array.size:
        return f"has shape {array.shape}, expected ({', '.join('any' if e is None else str(e) for e in expected)})"
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        return "holds NaN or Inf"
    return ""


def check_size(size: int | None) -> None:
    """Refuses a `--calibration-size` that makes no sense.

    Raises:
        UsageError: It is below 1 or above 65536.
    """
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise UsageError(f"--calibration-size: got {size}, expected 1 to {MAX_SIZE}")


def finite(ranges: Mapping[str, float]) -> Mapping[str, float]:
    """The ranges, if all are finite.

    Raises:
        IsthmusError: A value was NaN or infinite on the calibration data; all are listed.
    """
    reasons = [Reason(f"its range is {value}", where=name) for name, value in ranges.items() if not np.isfinite(value)]
    if reasons:
        raise IsthmusError("the model computes NaN or Inf on the calibration data", reasons=reasons[:20], hint="check the data")
    return ranges
