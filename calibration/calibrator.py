"""How the values that a quantised tensor holds follow from those that were seen: `Calibrator`, and the `register_calibrator` decorator.

A calibrator is one file in `calibration/calibrators/`, and the decorator above its class is its registration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..exporter.errors import UnknownNameError
from ..exporter.grids import Grid, Interval
from ..exporter.registry import Registry
from .histogram import Histogram

Array = np.ndarray[Any, Any]


class Calibrator(ABC):
    """Chooses which values to represent: what lies outside saturates, and what lies inside is rounded the finer the narrower it is.

    Attributes:
        name: The registered name.
    """

    name: ClassVar[str] = ""

    @abstractmethod
    def interval(self, seen: Histogram, grid: Grid) -> Interval:
        """The interval of one tensor.

        Args:
            seen: Its values; may be empty.
            grid: What it is stored on.

        Returns:
            An interval of the grid (see `Grid.interval`) within that of the values, and 0. [0, 0] for zeros, and where nothing was seen.
        """


class ChannelCalibrator(Calibrator):
    """One that chooses for the channels of a weight as well, from the numbers themselves: those of a channel are too few for a histogram to
    tell rare values from usual ones, and there are too many channels for a search in one.
    """

    @abstractmethod
    def channels(self, weight: Array, axis: int, grid: Grid) -> Interval:
        """The intervals of the channels of a weight.

        Args:
            weight: Finite numbers, any shape.
            axis: The axis that counts the channels.
            grid: What it is stored on.

        Returns:
            Arrays of one bound a channel, float64.
        """


CALIBRATORS: Registry[type[Calibrator]] = Registry("calibration method", "calibration/calibrators", "register_calibrator")


def channel_calibrators() -> list[str]:
    """The names of those that choose for the channels of a weight."""
    return [name for name in CALIBRATORS if issubclass(CALIBRATORS[name], ChannelCalibrator)]


def channel_calibrator(name: str) -> ChannelCalibrator:
    """The calibrator of that name.

    Raises:
        UnknownNameError: There is none that chooses for the channels of a weight.
    """
    known = channel_calibrators()
    if name not in known:
        raise UnknownNameError("calibrator of weights", name, known)
    found = CALIBRATORS[name]()
    assert isinstance(found, ChannelCalibrator)
    return found


C = TypeVar("C", bound=type[Calibrator])


def register_calibrator(name: str, *, summary: str) -> Callable[[C], C]:
    """Registers a calibrator. Both arguments must be literals (see `exporter.registry`)."""
    del summary  # read from the source

    def decorate(calibrator: C) -> C:
        calibrator.name = name
        CALIBRATORS.register(name, calibrator)
        return calibrator

    return decorate
