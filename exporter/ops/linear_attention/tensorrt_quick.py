"""Linear attention as quick plugins of TensorRT 11: the GPU part's kernel for short sequences, one token after the other.

It is right for every length, and made for single steps: what is parallel over the tokens needs memory between its launches, which such a
plugin has none of.
"""

from __future__ import annotations

from ...op import OPS
from ..gpu.plan import Plan
from ..plugin import quick
from . import gpu


def plans() -> tuple[Plan, ...]:
    """Those of the GPU part that have one launch."""
    return quick.one_launch(gpu.plans())


def register(architecture: str) -> None:
    """Registers the plugins with TensorRT: see `quick.register`."""
    quick.register(OPS["linear_attention"], plans(), architecture)
