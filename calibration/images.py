"""Calibration inputs from pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
) -> Iterator[tuple[str, Arrays]]:
    """Sets of inputs made of a folder's pictures, in the order of their names.

    A set has as many pictures as the example has rows; where the number of rows may vary, one. A model's other inputs are read from the
    file beside a picture with the same name and the ending `.npz`, one row for each picture.

    Args:
        folder: Holds `.png`, `.jpg` or `.webp` files.
        preprocess: The steps from a picture to the input.
        example: Example inputs; the input's shape says how many channels a picture has.
        free: For each input, the axes that may vary.
        size: The most sets that are made.

    Yields:
        Where the set comes from, and its inputs by name.

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
        arrays = {name: np.stack([read_picture(path, preprocess, channels) for path in chosen]).astype(example[name].dtype)}
        beside = [_beside(path.with_suffix(".npz")) for path in chosen]
        for other in beside[0]:
            arrays[other] = np.concatenate([found[other] for found in beside if other in found])
        yield chosen[0].name if rows == 1 else f"{chosen[0].name} to {chosen[-1].name}", arrays


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
            picture = opened.convert("L" if channels == 1 else "RGB")
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
    array: Array = np.asarray(picture, np.float32).reshape(picture.height, picture.width, channels) / np.float32(255)
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


def _beside(path: Path) -> dict[str, Array]:
    if not path.is_file():
        return {}
    cases = read_cases(path, limit_bytes=2**30)
    return {name: arrays[""] for name, arrays in cases.items() if "" in arrays}
