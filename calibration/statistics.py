"""What smoothing, bias correction and second-order rounding need to know of an activation: its channels, and how they vary together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..exporter.spec import Arrays
from .observe import Observer

Array = np.ndarray[Any, Any]
Float64 = np.ndarray[Any, np.dtype[np.float64]]

LIMIT = 2**29
"""Bytes of matrices that are summed up at a time."""


@dataclass(frozen=True)
class Channels:
    """The channels of an activation, along its last axis.

    Attributes:
        rows: How many vectors of channels were seen.
        peaks: (channels,) the largest |number|, float64.
        means: (channels,) float64.
    """

    rows: int
    peaks: Float64
    means: Float64


def channels(observer: Observer, sets: Sequence[Arrays], names: Sequence[str]) -> dict[str, Channels]:
    """The channels of activations over calibration data, by name. Raises like `Observer.stream`."""
    found: dict[str, Channels] = {}
    for _, name, array in observer.stream(sets, names):
        rows = array.reshape(-1, array.shape[-1])
        peaks, sums = np.abs(rows).max(axis=0).astype(np.float64), rows.sum(axis=0, dtype=np.float64)
        before = found.get(name)
        if before is not None:
            peaks, sums = np.maximum(peaks, before.peaks), sums + before.means * before.rows
        count = len(rows) + (before.rows if before is not None else 0)
        found[name] = Channels(count, peaks, sums / count)
    return found


def grams(
    observer: Observer, sets: Sequence[Arrays], sizes: Mapping[str, int], *, limit: int = LIMIT
) -> Iterator[tuple[str, Float64, int]]:
    """The sums of x xᵀ over all vectors of channels x of activations, one activation after the other.

    As many matrices as `limit` has room for are summed up in one pass over the data; with more the graph runs again.

    Args:
        observer: Whose values they are.
        sets: Calibration inputs.
        sizes: The activations' names, with their numbers of channels.
        limit: Bytes. A single matrix may be larger.

    Yields:
        A name, its (channels, channels) float64 sum, and the number of vectors. Raises like `Observer.stream`.
    """
    for group in _groups(sizes, limit):
        sums = {name: np.zeros((sizes[name], sizes[name])) for name in group}
        counts = dict.fromkeys(group, 0)
        for _, name, array in observer.stream(sets, group):
            rows = array.reshape(-1, sizes[name])
            # In float32, as the layer computes it, and summed up in float64 from call to call.
            sums[name] += rows.T @ rows
            counts[name] += len(rows)
        for name in group:
            yield name, sums.pop(name), counts[name]


def _groups(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        needed = 8 * size * size
        if group and held + needed > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += needed
    if group:
        yield group
