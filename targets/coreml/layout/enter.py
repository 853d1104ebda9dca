"""The layout of the Neural Engine, (B, C, 1, S): batch, channels, 1, positions.

Source: https://machinelearning.apple.com/research/neural-engine-transformers, principle 1: the channels-first format keeps the last axis,
the only one that is not packed but padded to 64 bytes, for the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .movement import Movement

LARGEST = 16384
"""The longest axis that the engine of an A15 takes; from the A16 on it takes 65536. Source: the documentation of sbryngelson/ANEForge."""


def entering(shape: Sequence[int], last: int = 1) -> Movement:
    """The movement of (B, ..., C), channels last, to (B, C, 1, S).

    Args:
        shape: Of rank `last` or more, without an axis of size 0. What stands between the first axis and the channels are positions.
        last: How many axes at the end are channels.
    """
    places, channels = tuple(shape[: len(shape) - last]), math.prod(shape[len(shape) - last :])
    batch, positions = (places[0] if places else 1), math.prod(places[1:])
    flat = Movement.view(shape, (batch, positions, channels))
    moved = flat.then(Movement.permute(flat.target, (0, 2, 1)))
    assert moved is not None
    entered = moved.then(Movement.view(moved.target, (batch, channels, 1, positions)))
    assert entered is not None
    return entered


def leaving(shape: Sequence[int], channels: int) -> Movement:
    """The movement from (B, C, 1, S) back to `shape` with another number of channels, on its last axis."""
    return entering((*shape[:-1], channels)).inverse()
