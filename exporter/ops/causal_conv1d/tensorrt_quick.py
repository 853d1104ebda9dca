"""The causal convolution as a quick plugin of TensorRT 11: the GPU part's kernel."""

from __future__ import annotations

from ...op import OPS
from ..gpu.plan import Plan
from ..plugin import quick
from . import gpu


def plans() -> tuple[Plan, ...]:
    """The GPU part's. The first one that fits is taken: which is faster depends on sizes that may be dynamic."""
    return quick.one_launch(gpu.plans())


def register(architecture: str) -> None:
    """Registers the plugin with TensorRT: see `quick.register`."""
    quick.register(OPS["causal_conv1d"], plans(), architecture)
