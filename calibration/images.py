"""Calibration inputs from pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..exporter.bundle import read_cases
from ..exporter.errors import IntegrityError, Reason, UsageError
from ..exporter.preprocess import PICTURES, Preprocess
from ..exporter.spec import Arrays

Array = np.ndarray[Any, Any]

MAX_PIXELS = 2**26
"""Of a picture: what the file says is checked before it is decoded."""

_FORMATS = ("PNG", "JPEG", "WEBP")


def picture_sets(
    folder: Path, preprocess: Preprocess, example: Arrays, free: Mapping[str, tuple[int, ...]], size: int
) -> Iterator[tuple[str, Arrays, list[Reason]]]:
    """Sets of inputs made of a folder's pictures, in the order of their names.

    A set has as many pictures as the example has rows; where the number of rows may vary, one. A model's other inputs are read from the
    file beside a picture with the same name and the ending `.npz`: one row for each picture where a set has several, the whole input where
    it has one.

    Args:
        folder: Holds `.png`, `.jpg` or `.webp` files.
        preprocess: The steps from a picture to the input.
        example: Example inputs; the input's shape says how many channels a picture has.
        free: For each input, the axes that may vary.
        size: The most sets that are made.

    Yields:
        Where the set comes from, its inputs by name, and why the files do not make a set; the inputs are then not complete.

    Raises:
        UsageError: The input is none of the model's, or has no shape of pictures.
        IntegrityError: A file is no picture, is damaged, or is larger than `MAX_PIXELS`.
    """
    name = preprocess.input or _only(example)
    channels = _channels(name, example, preprocess)
    rows = 1 if 0 in free.get(name, ()) else example[name].shape[0]
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    if len(paths) < rows:
        raise UsageError(
            f"--calibration-data: {folder} holds {len(paths)} pictures, and a set has {rows}",
            hint="add pictures, or make the batch dynamic",
        )
    for start in range(0, min(len(paths) // rows, size) * rows, rows):
        chosen = paths[start : start + rows]
        where = chosen[0].name if rows == 1 else f"{chosen[0].name} to {chosen[-1].name}"
        reasons: list[Reason] = []
        pictures = [read_picture(path, preprocess, channels) for path in chosen]
        stack = _joined({p.name: picture[None] for p, picture in zip(chosen, pictures, strict=True)}, f"{where}: {name}", _CROP, reasons)
        found = {name: stack.astype(example[name].dtype)} if stack is not None else {}
        yield where, {**found, **_others(chosen, name, where, reasons)}, reasons


_CROP = "give crop= in --calibration-preprocess, or make the batch dynamic"
_ROWS = "write one row beside each picture, such as numpy.savez(file, y=numpy.array([3]))"


def _others(chosen: Sequence[Path], name: str, where: str, reasons: list[Reason]) -> Arrays:
    """The inputs that the files beside a set's pictures hold; what is wrong with them is added to the reasons."""
    beside: dict[str, dict[str, Array]] = {}
    for picture in chosen:
        path = picture.with_suffix(".npz")
        held = read_cases(path, limit_bytes=2**30) if path.is_file() else {}
        for key, other in ((key, other) for key, arrays in held.items() for other in arrays if other):
            what = "is an input of a named set, expected inputs by their names alone beside a picture"
            reasons.append(Reason(what, f"{path.name}: {key}/{other}", f"call it {other}"))
        beside[picture.name] = {key: arrays[""] for key, arrays in held.items() if "" in arrays}
        if beside[picture.name].pop(name, None) is not None:
            fix = f"leave {name} out of the file, or {picture.name} out of the folder"
            reasons.append(Reason(f"is given twice: {picture.name} becomes {name} too", f"{path.name}: {name}", fix))
    found: dict[str, Array] = {}
    for other in dict.fromkeys(key for arrays in beside.values() for key in arrays):
        parts = {file: arrays[other] for file, arrays in beside.items() if other in arrays}
        if missing := [file for file in beside if file not in parts]:
            what = f"is given beside {', '.join(parts)}, and not beside {', '.join(missing)}"
            reasons.append(Reason(what, f"{where}: {other}", "give it beside every picture"))
        elif (array := _joined(parts, f"{where}: {other}", _ROWS, reasons)) is not None:
            found[other] = array
    return found


def _joined(parts: Mapping[str, Array], where: str, fix: str, reasons: list[Reason]) -> Array | None:
    """Rows of several files as one array; a single file's as it is. None, and a reason, where they do not fit together."""
    arrays = list(parts.values())
    if len(arrays) == 1:
        return arrays[0]
    if len({(array.dtype, array.shape) for array in arrays}) == 1 and arrays[0].ndim and len(arrays[0]) == 1:
        return np.concatenate(arrays)
    got = ", ".join(f"{file} {array.dtype} {array.shape}" for file, array in parts.items())
    reasons.append(Reason(f"got {got}, expected one row of one shape and dtype from each", where, fix))
    return None


def read_picture(path: Path, preprocess: Preprocess, channels: int) -> Array:
    """One picture as an array.

    Args:
        path: The file.
        preprocess: The steps.
        channels: 1 for grey, 3 for RGB.

    Returns:
        (C, H, W) or (H, W, C), float32.

    Raises:
        IntegrityError: See `picture_sets`.
    """
    try:
        with Image.open(path, formats=_FORMATS) as opened:
            if (pixels := opened.width * opened.height) > MAX_PIXELS:
                raise IntegrityError(f"{path} has {pixels} pixels, expected at most {MAX_PIXELS}")
            # Pillow clips 16 bits where it converts them to 8. As float32, 65535 becomes 255, and nothing is rounded.
            wide = opened.mode.startswith("I")
            picture = Image.fromarray(np.asarray(opened, np.float32) / 257) if wide else opened.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise IntegrityError(f"{path} cannot be read as a picture: {error}") from error
    if preprocess.resize is not None:
        factor = preprocess.resize / min(picture.size)
        if (pixels := round(picture.width * factor) * round(picture.height * factor)) > MAX_PIXELS:
            raise IntegrityError(f"{path} has {pixels} pixels after it is resized, expected at most {MAX_PIXELS}")
        picture = picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.BILINEAR)
    if preprocess.crop is not None:
        height, width = preprocess.crop
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        if left < 0 or top < 0:
            raise IntegrityError(
                f"{path} has {picture.height} x {picture.width} pixels, fewer than crop={height}x{width}", hint="give resize= as well"
            )
        picture = picture.crop((left, top, left + width, top + height))
    array: Array = np.asarray(picture, np.float32).reshape(picture.height, picture.width, -1) / np.float32(255)
    array = np.broadcast_to(array, (*array.shape[:2], channels))  # 16 bits of grey for three channels
    array = (array - np.asarray(preprocess.mean, np.float32)) / np.asarray(preprocess.std, np.float32)
    return np.ascontiguousarray(array.transpose(2, 0, 1) if preprocess.layout == "chw" else array)


def _only(example: Arrays) -> str:
    fitting = [name for name, array in example.items() if array.ndim == 4 and np.issubdtype(array.dtype, np.floating)]
    if len(fitting) != 1:
        raise UsageError(
            f"--calibration-preprocess does not say which input gets the pictures, and {len(fitting)} could",
            hint=f"give input=NAME, one of {', '.join(example)}",
        )
    return fitting[0]


def _channels(name: str, example: Arrays, preprocess: Preprocess) -> int:
    if name not in example:
        raise UsageError(f"--calibration-preprocess: the model has no input {name}", hint=f"its inputs are {', '.join(example)}")
    shape = example[name].shape
    channels = shape[1 if preprocess.layout == "chw" else -1] if len(shape) == 4 else 0
    reasons = []
    if channels not in (1, 3) or not np.issubdtype(example[name].dtype, np.floating):
        what = (
            f"has dtype {example[name].dtype} and shape {shape}, expected floating-point pictures of 1 or 3 channels in {preprocess.layout}"
        )
        reasons.append(Reason(what, where=name))
    reasons += [
        Reason(f"has {len(numbers)} numbers, expected 1 or {channels}", where=key)
        for key, numbers in (("mean", preprocess.mean), ("std", preprocess.std))
        if len(numbers) not in (1, channels)
    ]
    if reasons:
        raise UsageError("--calibration-preprocess does not fit the model", reasons=reasons)
    return channels
