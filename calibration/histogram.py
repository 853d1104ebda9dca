"""Histograms of streams of numbers whose sums do not depend on how the stream was cut.

Bins are `2 ** exponent` wide and aligned to 0: value x counts in bin floor(x / 2 ** exponent). When a value lies outside, the width
doubles, and each pair of bins becomes one, exactly: floor(x / 2w) = floor(floor(x / w) / 2). The exponent is the smallest at which all
values seen so far fit, whatever their order, and counts are integers: a histogram is a function of the values alone, and a merged one
equals that of all values together, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Counts = np.ndarray[Any, np.dtype[np.int64]]
Float64 = np.ndarray[Any, np.dtype[np.float64]]

_BITS = 12
BINS = 2**_BITS
"""Bins on either side of 0: 16 a code or more for 8-bit integers. A histogram takes at most 64 KiB."""

_SMALLEST = -149 - _BITS
"""The exponent at which float32's smallest number has the finest bins; below it nothing would change."""

_CHUNK = 2**16


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of numbers, with the exact smallest and largest.

    Attributes:
        exponent: Of the bins' width, a power of two.
        first: The index of the first bin that holds a number.
        counts: Numbers in this bin and in those after it, up to the last that holds one, int64.
        min: The smallest number; inf where there is none.
        max: The largest; -inf where there is none.
    """

    exponent: int
    first: int
    counts: Counts
    min: float
    max: float

    @staticmethod
    def of(values: Array, *, coarser: int = _SMALLEST) -> Histogram:
        """The histogram of an array.

        Args:
            values: Finite numbers, any shape, float or integer.
            coarser: The least exponent of the bins' width: that of a histogram to merge it with, which then need not be coarsened first.

        Raises:
            ValueError: A number is NaN or infinite.
        """
        flat = np.ravel(values)
        if not flat.size:
            return EMPTY
        low, high = float(flat.min()) + 0.0, float(flat.max()) + 0.0  # of the two zeros, the positive one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"a histogram takes finite numbers, got a range of {low} to {high}")
        exponent = exponent_of(low, high, _BITS, smallest=coarser)
        # In float64 the quotients are exact: the width is a power of two, and no quotient is subnormal. So they are in float32, which is
        # twice as fast, where bins are at most 1 wide: no quotient is then smaller than its number.
        scale = math.ldexp(1.0, -exponent)
        first, last = math.floor(low * scale), math.floor(high * scale)
        counts = np.zeros(last - first + 1, np.int64)
        dtype = np.float32 if flat.dtype == np.float32 and -126 <= exponent <= 0 else np.float64
        bins: Array = np.empty(min(flat.size, _CHUNK), dtype)
        indices = np.empty(bins.size, np.intp)
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            if part.size < bins.size:
                bins, indices = bins[: part.size], indices[: part.size]
            np.multiply(part, dtype(scale), out=bins, dtype=dtype)
            np.floor(bins, out=bins)
            bins -= dtype(first)
            indices[:] = bins
            counts += np.bincount(indices, minlength=counts.size)
        return Histogram(exponent, first, counts, low, high)

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def amax(self) -> float:
        """The largest |number|; 0 where there is none."""
        return max(0.0, -self.min, self.max) if self.counts.size else 0.0

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of the numbers of both. Associative and commutative, to the last bit."""
        if not self.counts.size or not other.counts.size:
            return self if self.counts.size else other
        exponent = max(self.exponent, other.exponent)
        a, b = self.coarsened(exponent), other.coarsened(exponent)
        first = min(a.first, b.first)
        counts = np.zeros(max(a.first + a.counts.size, b.first + b.counts.size) - first, np.int64)
        for part in (a, b):
            counts[part.first - first : part.first - first + part.counts.size] += part.counts
        return Histogram(exponent, first, counts, min(self.min, other.min), max(self.max, other.max))

    def coarsened(self, exponent: int) -> Histogram:
        """The same numbers in bins `2 ** exponent` wide, which must not be narrower than these."""
        shift = exponent - self.exponent
        if shift < 0:
            raise ValueError(f"bins of 2 ** {self.exponent} cannot be cut to 2 ** {exponent}")
        if not shift or not self.counts.size:
            return self
        first = self.first >> shift
        bins = (np.arange(self.first, self.first + self.counts.size) >> shift) - first
        starts = np.flatnonzero(np.diff(bins, prepend=-1))
        counts = np.zeros(int(bins[-1]) + 1, np.int64)
        counts[bins[starts]] = np.add.reduceat(self.counts, starts)
        return Histogram(exponent, first, counts, self.min, self.max)

    def summary(self, bins: int) -> Histogram:
        """The same numbers in the finest bins of which there are at most so many."""
        found = self
        while found.counts.size > max(bins, 2):
            found = found.coarsened(found.exponent + 1)
        return found

    def magnitudes(self) -> Counts:
        """Counts of |number| by bin, from 0 on. A negative number on an edge counts in the bin below it."""
        counts = np.zeros(max(self.first + self.counts.size, -self.first, 0), np.int64)
        cut = min(max(-self.first, 0), self.counts.size)  # bins of negative numbers
        above, below = self.counts[cut:], self.counts[:cut]
        if above.size:
            start = self.first + cut
            counts[start : start + above.size] += above
        if below.size:
            start = -(self.first + cut)
            counts[start : start + below.size] += below[::-1]
        return counts

    def quantile(self, share: float) -> float:
        """The smallest bin edge, or the largest |number|, that at least this share of all |numbers| does not exceed.

        Args:
            share: From 0 to 1.
        """
        if not self.counts.size:
            return 0.0
        reached = np.cumsum(self.magnitudes())
        index = int(np.searchsorted(reached, math.ceil(share * int(reached[-1]))))
        return min((index + 1) * self.width, self.amax)

    def tails(self, share: float) -> tuple[float, float]:
        """The bin edges, or the smallest and largest number, beyond each of which at most this share of all numbers lies.

        Args:
            share: Of each side, from 0 to 1/2.
        """
        if not self.counts.size:
            return 0.0, 0.0
        allowed = math.floor(share * self.count)
        left = int(np.searchsorted(np.cumsum(self.counts), allowed, side="right"))
        right = int(np.searchsorted(np.cumsum(self.counts[::-1]), allowed, side="right"))
        low, high = self.first + left, self.first + self.counts.size - right
        return max(low * self.width, self.min), min(high * self.width, self.max)

    def points(self, each: int = 2) -> tuple[Float64, Float64]:
        """Numbers that stand for those of the bins that hold any: evenly spaced within each, none beyond the smallest and largest.

        Returns:
            The numbers, rising, and how many of the values each stands for, both float64.
        """
        held = np.flatnonzero(self.counts)
        offsets = (2 * np.arange(each) + 1) / (2 * each)
        points = ((self.first + held)[:, None] + offsets).ravel() * self.width
        weights = np.repeat(self.counts[held] / each, each)
        return np.clip(points, self.min, self.max), weights

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return (self.exponent, self.first, self.min, self.max) == (other.exponent, other.first, other.min, other.max) and np.array_equal(
            self.counts, other.counts
        )

    __hash__ = None  # type: ignore[assignment]  # holds an array

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Index and count of every bin that holds a number."""
        return ((self.first + int(i), int(self.counts[i])) for i in np.flatnonzero(self.counts))


EMPTY = Histogram(_SMALLEST, 0, np.zeros(0, np.int64), math.inf, -math.inf)
"""The histogram of no numbers."""


def exponent_of(low: float, high: float, bits: int, *, smallest: int = _SMALLEST) -> int:
    """The smallest exponent at which floor(x / 2 ** exponent) is from -(2 ** bits) to 2 ** bits - 1 for both numbers and all between."""
    needed = smallest
    if high > 0:  # high < 2 ** k
        needed = max(needed, math.frexp(high)[1] - bits)
    if low < 0:  # -low <= 2 ** k: the bin of -(2 ** k) is the last on its side
        mantissa, k = math.frexp(-low)
        needed = max(needed, k - (mantissa == 0.5) - bits)
    return needed
