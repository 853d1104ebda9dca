"""How pictures become an input of a model: `--calibration-preprocess "input=x,resize=256,crop=256,mean=0.5,std=0.5,layout=chw"`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import Reason, UsageError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the files that are read as pictures."""

EXAMPLE = "input=x,resize=256,crop=256,mean=0.5,std=0.5,layout=chw"

MAX_SIDE = 2**13


@dataclass(frozen=True)
class Preprocess:
    """The steps from a picture to an array, in this order.

    Attributes:
        input: The model's input that gets the picture; empty for the only one that it may be.
        resize: Length of the shorter side, resampled with antialiasing (bilinear); None to leave the size.
        crop: Height and width of the middle that is cut out; None to leave it.
        mean: What is subtracted from pixels in [0, 1]: one number, or one a channel.
        std: What they are then divided by.
        layout: `chw` or `hwc`: where the array has the channels.
    """

    input: str = ""
    resize: int | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "chw"


def parse_preprocess(text: str) -> Preprocess:
    """Reads the option's text: `key=value` pairs with commas between.

    Sizes are `N` or `HEIGHTxWIDTH`; numbers of several channels have slashes between: `mean=0.485/0.456/0.406`.

    Raises:
        UsageError: A key is unknown or given twice, or a value is none of its kind; all are listed.
    """
    found: dict[str, object] = {}
    reasons = []
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            reasons.append(Reason(f"got {part.strip()!r}, expected key=value"))
        elif key in found:
            reasons.append(Reason("is given twice", where=key))
        elif key not in _READERS:
            reasons.append(Reason(f"is unknown; the keys are {', '.join(_READERS)}", where=key))
        else:
            try:
                found[key] = _READERS[key](value)
            except ValueError as error:
                reasons.append(Reason(f"got {value!r}, expected {error}", where=key))
    if reasons:
        raise UsageError("--calibration-preprocess cannot be read", reasons=reasons, hint=f"for example {EXAMPLE!r}")
    return Preprocess(**found)  # type: ignore[arg-type]  # each is of its reader's type


def _name(text: str) -> str:
    return text


def _side(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= MAX_SIDE:
        raise ValueError(f"a whole number from 1 to {MAX_SIDE}")
    return int(text)


def _sides(text: str) -> tuple[int, int]:
    height, times, width = text.partition("x")
    try:
        return _side(height), _side(width if times else height)
    except ValueError as error:
        raise ValueError(f"N or HEIGHTxWIDTH, each {error}") from error


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split("/"))
    except ValueError as error:
        raise ValueError("numbers with slashes between") from error
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("finite numbers")
    return numbers


def _divisors(text: str) -> tuple[float, ...]:
    numbers = _numbers(text)
    if not all(number > 0 for number in numbers):
        raise ValueError("numbers above 0")
    return numbers


def _layout(text: str) -> str:
    if text not in ("chw", "hwc"):
        raise ValueError("chw or hwc")
    return text


_READERS = {"input": _name, "resize": _side, "crop": _sides, "mean": _numbers, "std": _divisors, "layout": _layout}
