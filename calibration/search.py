"""The search for the interval of the least cost, which calibrators share that differ in the cost alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from ..exporter.grids import Grid, Interval

Cost = Callable[[Interval], float]

STEPS = 16
"""Candidates for each halving of an interval's end: they are 4.4 % apart."""

HALVINGS = 7
"""The narrowest candidate is 1/128 of what was seen."""

_FINER = 8  # candidates between two of the first round

_ROUNDS = 2  # of one end and then the other, on asymmetric grids


def narrowest(whole: Interval, grid: Grid, cost: Cost) -> Interval:
    """The interval of the least cost, the widest of several.

    Symmetric intervals are tried at `STEPS` sizes for each halving, and around the best of these at finer ones. An asymmetric interval is
    cut on one side while the other stays, by turns.

    Args:
        whole: The interval that holds everything; its ends are cut.
        grid: What values are stored on.
        cost: Of an interval; may be inf.
    """
    if whole.amax == 0:
        return whole
    if grid.symmetric:
        return _search(cost, lambda factor: grid.interval(0.0, whole.high * factor))
    best = whole
    for _ in range(_ROUNDS):
        if whole.high:
            best = _search(cost, functools.partial(_cut_above, best, whole.high))
        if whole.low:
            best = _search(cost, functools.partial(_cut_below, best, whole.low))
    return best


def _cut_above(interval: Interval, end: float, factor: float) -> Interval:
    return Interval(interval.low, end * factor)


def _cut_below(interval: Interval, end: float, factor: float) -> Interval:
    return Interval(end * factor, interval.high)


def _search(cost: Cost, at: Callable[[float], Interval]) -> Interval:
    first = min((_costed(cost, at, step / STEPS) for step in range(STEPS * HALVINGS + 1)), key=lambda found: found[0])
    return min(_around(cost, at, first), key=lambda found: found[0])[2]


def _around(cost: Cost, at: Callable[[float], Interval], first: tuple[float, float, Interval]) -> Iterator[tuple[float, float, Interval]]:
    yield first
    for finer in range(-_FINER + 1, _FINER):
        halvings = first[1] + finer / (_FINER * STEPS)
        if finer and halvings >= 0:
            yield _costed(cost, at, halvings)


def _costed(cost: Cost, at: Callable[[float], Interval], halvings: float) -> tuple[float, float, Interval]:
    interval = at(2.0**-halvings)
    return cost(interval), halvings, interval
