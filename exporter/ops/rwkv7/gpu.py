"""Plans of RWKV-7's time mixing on a GPU; the kernels, and which of them are parallel over chunks, are in `exporter.ops.recurrence_gpu`."""

from __future__ import annotations

import functools

from ..gpu.plan import Plan
from ..recurrence_plans import Recurrence
from ..recurrence_plans import plans as recurrence_plans

TENSOR_CORES = True
"""Whether the kernels for float16 and bfloat16 are to use tensor cores."""


@functools.cache
def plans() -> tuple[Plan, ...]:
    """Every plan, the preferred ones first."""
    names = {"q": "r", "k": "k", "beta": "k", "betas": "1", "scale": "1"}
    recurrence = Recurrence("RWKV7", 2, True, "num_heads", "1", names, scaled=False)
    return tuple(plan for dtype in ("float32", "float16", "bfloat16") for plan in recurrence_plans(recurrence, dtype))
