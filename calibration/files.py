"""Calibration inputs from files and callables: sizes are bounded before anything is allocated, and all faults are reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..exporter.bundle import read_cases
from ..exporter.errors import IntegrityError, IsthmusError, Reason, UsageError
from ..exporter.preprocess import PICTURES, Preprocess
from ..exporter.source import call_by_path
from ..exporter.spec import Arrays
from .images import picture_sets

Array = np.ndarray[Any, Any]

MAX_SETS = 2**16

MAX_BYTES = 8 * 2**30
"""Of all inputs together: they are held in memory."""

SHOWN = 20
"""Faults that are listed; of more it is said how many there are."""

NamedSets = list[tuple[str, Arrays]]
"""Sets of inputs, each with where it comes from."""

_ARRAYS = (".npz", ".safetensors")


@dataclass(frozen=True)
class Expected:
    """What the inputs of a model are.

    Attributes:
        example: Example inputs.
        free: For each input, the axes that may have another size than the example's.
    """

    example: Arrays
    free: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def faults(self, where: str, arrays: Arrays) -> Iterator[Reason]:
        """Why a set of inputs cannot be used."""
        missing = [name for name in self.example if name not in arrays]
        yield from (
            Reason("is missing", f"{where}: {name}", f"add it, {_shape(self.sizes(name))} {self.example[name].dtype}") for name in missing
        )
        for name, array in arrays.items():
            if name not in self.example:
                near = difflib.get_close_matches(name, missing, n=1)
                fix = f"call it {near[0]}" if near else "leave it out"
                yield Reason(f"is no input; the inputs are {', '.join(self.example)}", f"{where}: {name}", fix)
            else:
                yield from self._misfits(f"{where}: {name}", array, self.example[name], self.sizes(name))
        # Axes that vary together in the example have to do so here.
        rows = {name: a.shape[0] for name, a in arrays.items() if name in self.example and 0 in self.free.get(name, ()) and a.ndim}
        same = {self.example[name].shape[0] for name in rows}
        if len(same) == 1 and len(set(rows.values())) > 1:
            fix = "give each as many rows"
            yield Reason(f"the inputs have different numbers of rows: {', '.join(f'{n} {r}' for n, r in rows.items())}", where, fix)

    def sizes(self, name: str) -> list[int | None]:
        """The sizes of an input; None where it may have any."""
        return [None if i in self.free.get(name, ()) else size for i, size in enumerate(self.example[name].shape)]

    @staticmethod
    def _misfits(where: str, array: Array, like: Array, sizes: Sequence[int | None]) -> Iterator[Reason]:
        if array.dtype != like.dtype:
            yield Reason(f"has dtype {array.dtype}, expected {like.dtype}", where, f"write it with .astype('{like.dtype}')")
        fits = array.ndim == len(sizes) and all(e in (None, s) for e, s in zip(sizes, array.shape, strict=True))
        if not fits or not array.size:
            fix = "write it with [None], as one row" if array.ndim == len(sizes) - 1 else "give it that shape, or make the axis --dynamic"
            yield Reason(f"has shape {array.shape}, expected {_shape(sizes)}", where, fix)
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            yield Reason("holds NaN or Inf", where, "leave the set out, or mend what made it")


def _shape(sizes: Sequence[int | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in sizes)})"


def read_sets(path: Path, expected: Expected, size: int, preprocess: Preprocess | None = None) -> NamedSets:
    """The sets of a file, or of a folder of files in the order of their names, each with where it comes from.

    Args:
        path: An `.npz` or `.safetensors` file with one set of inputs under their names, or several under `set/name`; or a folder of such
            files; or a folder of pictures (see `images.picture_sets`).
        expected: What the inputs are.
        size: The most sets that are used; all are checked.
        preprocess: What becomes of pictures.

    Raises:
        UsageError: There is no such file, or it does not fit the model; the first `SHOWN` faults are listed, and how many more there are.
        IntegrityError: A file is damaged, or what it unpacks to is larger than `MAX_BYTES`.
    """
    if not path.exists():
        raise UsageError(
            f"--calibration-data: {path} does not exist",
            hint="give an .npz or .safetensors file, a folder, module:callable, or the word random",
        )
    if holds_pictures(path):
        assert preprocess is not None, "data.check_preprocess refuses pictures without it"
        return _checked(picture_sets(path, preprocess, expected.example, expected.free, size), expected, str(path), size)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in _ARRAYS) if path.is_dir() else [path]
    if not files:
        raise UsageError(
            f"--calibration-data: the folder {path} holds no .npz or .safetensors file and no picture", hint="write them with numpy.savez"
        )
    return _checked(_read(files), expected, str(path), size)


def called_sets(path: str, expected: Expected, size: int) -> NamedSets:
    """The sets that `module:callable` gives, each with where it comes from: an iterable of mappings from an input's name to an array or
    tensor.

    Args:
        path: The module and the callable in it, which takes no arguments.
        expected: What the inputs are.
        size: How many sets are taken; those after them are not asked for.

    Raises:
        UsageError: There is no such callable, or what it gives does not fit the model.
        IsthmusError: It fails.
    """
    given = call_by_path(path)

    def sets() -> Iterator[tuple[str, Arrays, Sequence[Reason]]]:
        for index, arrays in enumerate(_taken(path, given, size)):
            if not isinstance(arrays, Mapping):
                raise UsageError(
                    f"--calibration-data: set {index} of {path} is a {type(arrays).__name__}, expected a mapping from names to arrays"
                )
            yield f"{path}, {index}", {str(name): _as_array(value) for name, value in arrays.items()}, ()

    return _checked(sets(), expected, path, size)


def is_callable_path(text: str) -> bool:
    """Whether a text is `module:callable`, and no file."""
    module, colon, name = text.partition(":")
    parts = (*module.split("."), *name.split("."))
    return bool(colon) and all(part.isidentifier() for part in parts) and not Path(text).exists()


def holds_pictures(path: Path) -> bool:
    """Whether a path is a folder of pictures."""
    return path.is_dir() and any(p.suffix.lower() in PICTURES for p in path.iterdir())


def _taken(path: str, given: object, size: int) -> Iterator[object]:
    try:
        iterator = iter(given)  # type: ignore[call-overload]  # anything may be given
    except TypeError as error:
        raise UsageError(
            f"--calibration-data: {path} gave a {type(given).__name__}, expected an iterable of mappings from names to arrays"
        ) from error
    for _ in range(size):
        try:
            yield next(iterator)
        except StopIteration:
            return
        except Exception as error:  # the user's code raises what it likes
            raise IsthmusError(f"{path} failed: {type(error).__name__}: {error}") from error


def _as_array(value: object) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _read(files: list[Path]) -> Iterator[tuple[str, Arrays, Sequence[Reason]]]:
    held = 0
    for file in files:
        try:
            cases = _READERS.get(file.suffix.lower(), _read_npz)(file, MAX_BYTES - held)
        except IntegrityError as error:
            raise IntegrityError(error.message, hint="write it with numpy.savez, inputs by name or set/name") from error
        held += sum(array.nbytes for arrays in cases.values() for array in arrays.values())
        flat = {name: arrays[""] for name, arrays in cases.items() if set(arrays) == {""}}  # no slash in the key
        yield from ((f"{file.name}, {name}", arrays, ()) for name, arrays in cases.items() if name not in flat)
        if flat:
            yield file.name, flat, ()


def _within(held: int, where: str) -> int:
    if held > MAX_BYTES:
        raise UsageError(
            f"--calibration-data: {where} gives more than {MAX_BYTES // 2**30} GiB of inputs", hint="give fewer sets: --calibration-size"
        )
    return held


def _read_npz(path: Path, limit: int) -> dict[str, dict[str, Array]]:
    return read_cases(path, limit_bytes=limit)


def _read_safetensors(path: Path, limit: int) -> dict[str, dict[str, Array]]:
    from safetensors import SafetensorError, safe_open

    # A safetensors file holds its tensors as they are, and the library checks that they lie within it.
    if (size := path.stat().st_size) > limit:
        raise IntegrityError(f"{path} holds {size} bytes, expected at most {limit}")
    cases: dict[str, dict[str, Array]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                case, _, name = key.partition("/")
                cases.setdefault(case, {})[name] = _as_array(file.get_tensor(key))
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} cannot be read as safetensors: {error}") from error
    return cases


_READERS: Mapping[str, Callable[[Path, int], dict[str, dict[str, Array]]]] = {".npz": _read_npz, ".safetensors": _read_safetensors}


def _checked(sets: Iterator[tuple[str, Arrays, Sequence[Reason]]], expected: Expected, text: str, size: int) -> NamedSets:
    """The sets, each of which comes with why it is none, where it was read from several files."""
    reasons: list[Reason] = []
    found: NamedSets = []
    held = 0
    for where, arrays, faults in sets:
        reasons += faults or expected.faults(where, arrays)
        if len(found) < size and not reasons:
            held = _within(held + sum(array.nbytes for array in arrays.values()), text)
            found.append((where, {name: arrays[name] for name in expected.example}))
    if (more := len(reasons) - SHOWN) > 0:
        reasons[SHOWN:] = [Reason(f"and {more} more")]
    if reasons:
        names = ", ".join(f"{name} {_shape(expected.sizes(name))} {array.dtype}" for name, array in expected.example.items())
        raise UsageError(f"--calibration-data: {text} does not fit the model", reasons=reasons, hint=f"a set of inputs is {names}")
    if not found:
        raise UsageError(f"--calibration-data: {text} gives no inputs", hint="write at least one set of inputs")
    return found


def tried(sets: NamedSets, example: Arrays, run: Callable[[Arrays], object], text: str) -> None:
    """Runs the model on the few sets that say whether it can compute all of them.

    These are, of each combination of shapes that is not the example's, the first set; and for each input of whole numbers, such as labels,
    those with the smallest and the largest: an index is out of range there or nowhere.

    Args:
        sets: The sets, which fit the example.
        example: Example inputs, on which the model runs.
        run: One call of the model.
        text: What the sets were given as.

    Raises:
        UsageError: The model fails on some; each is listed.
    """
    whole = [name for name, array in example.items() if array.dtype.kind in "iu"]
    chosen: dict[object, int] = {tuple(array.shape for array in example.values()): -1}
    for i, (_, arrays) in enumerate(sets):
        chosen.setdefault(tuple(arrays[name].shape for name in example), i)
    for name in whole:
        chosen[name, "smallest"] = min(range(len(sets)), key=lambda i: sets[i][1][name].min())
        chosen[name, "largest"] = max(range(len(sets)), key=lambda i: sets[i][1][name].max())
    reasons = []
    for where, arrays in (sets[i] for i in sorted(set(chosen.values())) if i >= 0):
        try:
            run(arrays)
        except IsthmusError as error:
            numbers = ", ".join(f"{name} from {arrays[name].min()} to {arrays[name].max()}" for name in whole)
            shapes = ", ".join(f"{name} {arrays[name].shape}" for name in example)
            reasons.append(Reason(f"{error.message.splitlines()[0]}; it was given {shapes}{'; ' if numbers else ''}{numbers}", where))
    if reasons:
        raise UsageError(
            f"--calibration-data: the model fails on inputs of {text}",
            reasons=reasons,
            hint="leave these sets out, or mend them: labels and indices have to be those that the model knows, sizes those that it takes",
        )
