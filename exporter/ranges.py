"""What was observed of a model's activations on calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Calibration:
    """The ranges of a model's activations, and where they come from.

    Attributes:
        ranges: Name of a value of the float32 ONNX graph to the largest |value| to represent, as the method chose it.
        method: The calibrator's registered name.
        source: `trajectories` (what the model sees while it samples, with its trained weights), `random`, or the name of a file or folder.
        size: Number of sets of inputs.
        sha256: Of the calibration inputs' bytes.
    """

    ranges: Mapping[str, float]
    method: str
    source: str
    size: int
    sha256: str = ""

    @property
    def random(self) -> bool:
        """Whether the data says nothing of what the model will see."""
        return self.source == "random"
