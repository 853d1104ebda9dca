"""The modules' errors against the timestep, along the calls that a sampler makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..exporter.flow import Values
from ..exporter.spec import Arrays, Sampler
from .diff import MEMORY, Reference, diff


def sampled_calls(sampler: Sampler, run: Callable[[Arrays], Arrays], *, seed: int, count: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The inputs of some of the calls that a sampler makes with the reference, evenly spaced from the first to the last.

    Only these are held: which they are is known beforehand, because the calls are counted first, on a model that computes zeros.

    Args:
        sampler: How pictures are drawn.
        run: One call of the PyTorch model.
        seed: The sampler's seed.
        count: How many calls; all of them when there are no more.
    """
    calls = _number(sampler, run, seed)
    while True:
        chosen = set(np.linspace(0, calls - 1, min(count, calls)).round().astype(int).tolist())
        kept: list[dict[str, np.ndarray[Any, Any]]] = []
        made = 0

        def recording(inputs: Arrays, chosen: set[int] = chosen, kept: list[dict[str, np.ndarray[Any, Any]]] = kept) -> Arrays:
            nonlocal made
            if made in chosen:
                kept.append({name: np.array(array, copy=True) for name, array in inputs.items()})
            made += 1
            return run(inputs)

        sampler(recording, np.random.Generator(np.random.PCG64(seed)))
        if made == calls:
            return kept
        calls = made  # of a sampler whose number of calls depends on what the model computes; it makes as many from the same seed again


def _number(sampler: Sampler, run: Callable[[Arrays], Arrays], seed: int) -> int:
    """How many calls a sampler makes of a model that computes zeros. The model runs once for inputs of each shape, for its outputs'."""
    made = 0
    zeros: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, np.ndarray[Any, Any]]] = {}

    def counting(inputs: Arrays) -> Arrays:
        nonlocal made
        made += 1
        key = tuple((name, array.shape) for name, array in inputs.items())
        if key not in zeros:
            zeros[key] = {name: np.zeros_like(array) for name, array in run(inputs).items()}
        return {name: array.copy() for name, array in zeros[key].items()}

    with np.errstate(all="ignore"):
        sampler(counting, np.random.Generator(np.random.PCG64(seed)))
    return made


def against_timestep(
    reference: Reference, values: Values, calls: Sequence[Arrays], timestep: str, *, threshold: float, memory: int = MEMORY
) -> list[dict[str, Any]]:
    """The errors of every module at every call of a trajectory, as JSON values.

    Args:
        reference: The PyTorch module.
        values: The program.
        calls: The inputs of each call; see `sampled_calls`.
        timestep: The name of the input that holds the timestep of each row.
        threshold: See `diff`.
        memory: See `diff`.

    Returns:
        A row for each call and visible module, in order: `timestep` (the mean of the call's rows), `module`, and the relative errors
        `total`, `inherited` and `injected`, which are None where they are not known or not finite.

    Raises:
        IsthmusError: See `diff`.
    """
    rows: list[dict[str, Any]] = []
    for inputs in calls:
        time = float(np.mean(inputs[timestep], dtype=np.float64))
        for row in diff(reference, values, inputs, threshold=threshold, memory=memory):
            if row.visible:
                errors = {name: getattr(row, name) for name in ("total", "inherited", "injected")}
                known = {k: f.relative_l2 if f is not None and np.isfinite(f.relative_l2) else None for k, f in errors.items()}
                rows.append({"timestep": time, "module": row.module, **known})
    return rows
