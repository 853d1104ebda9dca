"""The windows of pooling: their sizes, and how far the last one reaches where sizes are rounded upwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def sizes(given: Sequence[int], rank: int) -> list[int]:
    """One size for each axis."""
    given = [given] if isinstance(given, int) else list(given)
    return given if len(given) == rank else [given[0]] * rank


def beyond(size: Any, window: int, stride: int, pad: int, ceil_mode: bool) -> int:
    """How far the last window reaches beyond the padded end: it may, when it begins within the input or before it."""
    if not ceil_mode:
        return 0
    count = -(-(size + 2 * pad - window) // stride) + 1
    if (count - 1) * stride >= size + pad:
        count -= 1
    return int(max((count - 1) * stride + window - size - 2 * pad, 0))


def in_torch_order(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Widths for `F.pad`: the last axis first."""
    return [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
