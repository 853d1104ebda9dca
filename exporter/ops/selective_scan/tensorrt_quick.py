"""The selective scan as a quick plugin of TensorRT 11: the GPU part's kernel over the whole sequence, in one pass.

One pass is serial over the tokens: the chunked plans of the GPU part need memory between their launches, which such a plugin has none of.
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
    quick.register(OPS["selective_scan"], plans(), architecture)
