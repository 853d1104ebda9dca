"""A sampler over an artifact whose batch size is fixed: its batches are cut into those of the artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..exporter.spec import Arrays, Sampler, Samples


@dataclass(frozen=True)
class InBatches:
    """Draws the same pictures with several calls of fewer rows.

    Attributes:
        sampler: Draws pictures with `sampler.batch` rows a call.
        rows: Rows of each call of the model; divides `sampler.batch`.
        axes: For each input that has one, the axis of the batch. Other inputs go into every call as they are.
    """

    sampler: Sampler
    rows: int
    axes: Mapping[str, int]

    @property
    def batch(self) -> int:
        """Rows of each call."""
        return self.rows

    def __call__(self, step: Callable[[Arrays], Arrays], rng: np.random.Generator) -> Samples:
        """Draws pictures; see `Sampler`."""
        return self.sampler(self._whole(step), rng)

    def calibration_inputs(
        self, step: Callable[[Arrays], Arrays], rng: np.random.Generator, *, size: int, batch: int
    ) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """What the model sees; see `Sampler`."""
        return self.sampler.calibration_inputs(self._whole(step), rng, size=size, batch=batch)

    def _whole(self, step: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Arrays]:
        def whole(inputs: Arrays) -> Arrays:
            count = next(inputs[name].shape[axis] for name, axis in self.axes.items())
            parts = []
            for start in range(0, count, self.rows):
                cut = {
                    name: array.take(range(start, start + self.rows), self.axes[name]) if name in self.axes else array
                    for name, array in inputs.items()
                }
                parts.append(step(cut))
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

        return whole
