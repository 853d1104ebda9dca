"""What smoothing, bias correction and second-order rounding need to know of an activation: its channels, and how they vary together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..exporter.spec import Arrays
from .observe import Observer

Array = np.ndarray[Any, Any]
Float32 = np.ndarray[Any, np.dtype[np.float32]]
Float64 = np.ndarray[Any, np.dtype[np.float64]]

LIMIT = 2**29
"""Bytes of matrices that are summed up at a time."""

ROWS = 3072
"""Vectors of channels that second moments are taken from, or twice the number of channels where that is more: damped moments (see
`rounding.DAMPING`) hardly change with more. Where there are more vectors, so many of every call are drawn, with a fixed seed."""

_TOGETHER = 1024
"""Vectors that are multiplied at a time: a product of few costs as much as the sum that it is added to."""

PEAK_SETS = 4
"""Sets of inputs that channels are compared on before they are smoothed: any factors leave the graph's outputs as they are."""


def peaks(observer: Observer, sets: Sequence[Arrays], names: Sequence[str], *, most: int = PEAK_SETS) -> dict[str, Float64]:
    """The largest |number| of every channel of activations, (channels,) along their last axes, by name. Raises like `Observer.stream`.

    Args:
        observer: Whose values they are.
        sets: Calibration inputs.
        names: The activations' names.
        most: How many sets are looked at, evenly spaced.
    """
    count = min(len(sets), most)
    found: dict[str, Float64] = {}
    for _, name, array in observer.stream([sets[i * len(sets) // count] for i in range(count)], names):
        rows = array.reshape(-1, array.shape[-1])
        seen = np.maximum(rows.max(axis=0), -rows.min(axis=0)).astype(np.float64)
        found[name] = np.maximum(seen, found[name]) if name in found else seen
    return found


@dataclass(frozen=True)
class Moments:
    """How the channels of an activation vary.

    Attributes:
        rows: From how many vectors x of channels.
        sums: (channels,) float64, of x.
        gram: (channels, channels) float32, of x xᵀ.
    """

    rows: int
    sums: Float64
    gram: Float32

    @property
    def means(self) -> Float64:
        """(channels,) the mean vector."""
        return self.sums / max(self.rows, 1)


class Gathering:
    """Sums up moments while values pass by, so that the graph need not run for them alone.

    Args:
        sizes: The activations' names, with their numbers of channels.
        calls: How many calls of the graph there are.
        limit: Bytes of matrices that are held; activations that do not fit are left out. A single matrix may be larger.
    """

    def __init__(self, sizes: Mapping[str, int], calls: int, *, limit: int = LIMIT) -> None:
        self._calls = max(calls, 1)
        self._sums: dict[str, tuple[int, Float64, Float32]] = {}
        self._waiting: dict[str, list[Array]] = {}
        self.left: dict[str, int] = {}
        held = 0
        for name, size in sizes.items():
            held += 4 * size * size
            if self._sums and held > limit:
                self.left = {key: sizes[key] for key in list(sizes)[len(self._sums) :]}
                break
            self._sums[name] = (0, np.zeros(size), np.zeros((size, size), np.float32))

    @property
    def names(self) -> list[str]:
        """The activations that are gathered; `left` has the others."""
        return list(self._sums)

    def see(self, call: int, name: str, array: Array) -> None:
        """Adds what one call of the graph computes for an activation; passes over one that is not gathered."""
        if name not in self._sums:
            return
        count, sums, gram = self._sums[name]
        rows = array.reshape(-1, len(sums))
        most = -(-max(ROWS, 2 * len(sums)) // self._calls)
        if len(rows) > most:
            chosen = np.random.Generator(np.random.PCG64(call)).choice(len(rows), most, replace=False)
            rows = rows[np.sort(chosen)]
        sums += rows.sum(axis=0, dtype=np.float64)
        self._sums[name] = (count + len(rows), sums, gram)
        waiting = self._waiting.setdefault(name, [])
        waiting.append(rows)
        if sum(map(len, waiting)) >= _TOGETHER:
            self._multiply(name)

    def _multiply(self, name: str) -> None:
        """Adds the rows that wait. In float32, as the layer computes it: what is damped by a hundredth needs no more."""
        if waiting := self._waiting.pop(name, None):
            rows = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
            gram = self._sums[name][2]
            gram += rows.T @ rows

    def found(self) -> Iterator[tuple[str, Moments]]:
        """Every activation that was gathered, with its moments, which are then no longer held."""
        for name in self.names:
            self._multiply(name)
            yield name, Moments(*self._sums.pop(name))


def moments(
    observer: Observer, sets: Sequence[Arrays], sizes: Mapping[str, int], *, gathered: Gathering | None = None, limit: int = LIMIT
) -> Iterator[tuple[str, Moments]]:
    """The moments of activations, one after the other.

    As many matrices as `limit` has room for are summed up in one pass over the data; with more the graph runs again.

    Args:
        observer: Whose values they are.
        sets: Calibration inputs.
        sizes: The activations' names, with their numbers of channels.
        gathered: What an earlier pass over the same inputs gathered of some of them.
        limit: Bytes. A single matrix may be larger.

    Yields:
        A name with its moments. Raises like `Observer.stream`.
    """
    left = dict(sizes) if gathered is None else gathered.left
    if gathered is not None:
        yield from gathered.found()
    while left:
        gathering = Gathering(left, len(sets), limit=limit)
        for call, name, array in observer.stream(sets, gathering.names):
            gathering.see(call, name, array)
        left = gathering.left
        yield from gathering.found()
