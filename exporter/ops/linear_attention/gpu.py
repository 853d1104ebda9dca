"""Plans of linear attention on a GPU; the kernels, and which of them are parallel over chunks, are in `exporter.ops.recurrence_gpu`.

The rules without removal are parallel over chunks but for an addition of states, the delta rules but for two products a chunk.
"""

from __future__ import annotations

import functools

from ..gpu.plan import Plan
from ..recurrence_plans import Recurrence
from ..recurrence_plans import plans as recurrence_plans

TENSOR_CORES = True
"""Whether the kernels for float16 and bfloat16 are to use tensor cores."""

_NONE, _A_HEAD, _A_CHANNEL = (0, "1", ""), (1, "decays == 1", "decay a head, "), (2, "decays == key", "decay a key channel, ")

_FORMS = {
    "PlainLinearAttention": (None, (_NONE,)),
    "GatedLinearAttention": (None, (_A_HEAD, _A_CHANNEL)),
    "DeltaLinearAttention": (False, (_NONE,)),
    "GatedDeltaLinearAttention": (False, (_A_HEAD, _A_CHANNEL)),
}


@functools.cache
def plans() -> tuple[Plan, ...]:
    """Every plan, the preferred ones first."""
    # What a rule has not is some address that is never read.
    names = {"a": "k", "b": "k", "mixed": "inverses", "given_products": "states", "solved_products": "states"}
    result: list[Plan] = []
    for form, (removal, decays) in _FORMS.items():
        absent = {"solutions": "states", "beta": "k", "betas": "1"} if removal is None else {}
        for decay, fits, label in decays:
            recurrence = Recurrence(
                form, decay, removal, "kv_num_heads", "q_num_heads//kv_num_heads", {"k": "k", **names, **absent}, fits=fits, label=label
            )
            for dtype in ("float32", "float16", "bfloat16"):
                result += recurrence_plans(recurrence, dtype)
    return tuple(result)
