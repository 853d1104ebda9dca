"""The search for the interval of the least cost, which calibrators share that differ in the cost alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..exporter.grids import Grid, Interval

Array = np.ndarray[Any, Any]

Costs = Callable[[Interval], Array]
"""Of several intervals, whose bounds are arrays; costs may be inf."""

STEPS = 16
"""Candidates for each halving of an interval's end: they are 4.4 % apart."""

HALVINGS = 7
"""The narrowest candidate is 1/128 of what was seen."""

_FINER = 8  # candidates between two of the first round

_ROUNDS = 2  # of one end and then the other, on asymmetric grids


def narrowest(whole: Interval, grid: Grid, costs: Costs) -> Interval:
    """The interval of the least cost, the widest of several.

    Symmetric intervals are tried at `STEPS` sizes for each halving, and around the best of these at finer ones. An asymmetric interval is
    cut on one side while the other stays, by turns.

    Args:
        whole: The interval that holds everything; its ends are cut.
        grid: What values are stored on.
        costs: Of candidates.
    """
    if whole.amax == 0:
        return whole
    if grid.symmetric:
        return _search(costs, lambda factors: grid.interval(0.0, whole.high * factors))
    best = whole
    for _ in range(_ROUNDS):
        if whole.high:
            best = _search(costs, functools.partial(_cut_above, best, whole.high))
        if whole.low:
            best = _search(costs, functools.partial(_cut_below, best, whole.low))
    return best


def _cut_above(interval: Interval, end: float, factors: Array) -> Interval:
    return Interval(np.full_like(factors, interval.low), end * factors)


def _cut_below(interval: Interval, end: float, factors: Array) -> Interval:
    return Interval(end * factors, np.full_like(factors, interval.high))


def _search(costs: Costs, at: Callable[[Array], Interval]) -> Interval:
    halvings = np.arange(STEPS * HALVINGS + 1) / STEPS
    least, first = _least(costs, at, halvings)
    around = first + np.arange(-_FINER + 1, _FINER) / (_FINER * STEPS)
    finer = around[(around >= 0) & (around != first)]
    found, second = _least(costs, at, finer)
    best = at(np.array([2.0 ** -(second if found < least else first)]))
    return Interval(float(best.low[0]), float(best.high[0]))


def _least(costs: Costs, at: Callable[[Array], Interval], halvings: Array) -> tuple[float, float]:
    """The least cost, and the first of the candidates that have it."""
    found = costs(at(2.0**-halvings))
    index = int(np.argmin(found))
    return float(found[index]), float(halvings[index])
