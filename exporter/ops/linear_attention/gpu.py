"""Plans of linear attention on a GPU; the kernels, and which of them are parallel over chunks, are in `exporter.ops.recurrence_gpu`.

The rules without removal are parallel over chunks but for an addition of states, the delta rules but for two products a chunk.

FP8 (e4m3) queries, keys and values are for the rules without removal. A scale a tensor is no input: y is linear in q, and y and the state
are linear in k and v, so that the scales of all three go into the attribute `scale`, and the state is in units of those of k and v
(`fp8.fold_scales`). y has the dtype of the decay, or float16 where there is none; states are float32 as ever. The delta rules square the
keys, and their state is not linear in k: they take no FP8.
"""

from __future__ import annotations

import functools

from ..gpu.plan import Plan
from ..recurrence_plans import Recurrence
from ..recurrence_plans import plans as recurrence_plans

TENSOR_CORES = True
"""Whether the kernels for float16 and bfloat16 are to use tensor cores."""

FP8 = "float8_e4m3fn"

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
    names = {"a": "k", "b": "k", "mixed": "inverses"}
    result: list[Plan] = []
    for form, (removal, decays) in _FORMS.items():
        absent = {"beta": "k", "betas": "1"} if removal is None else {}
        dtypes: list[tuple[str, str]] = [(dtype, "") for dtype in ("float32", "float16", "bfloat16")]
        if removal is None:
            dtypes += [(FP8, out) for out in ("float16", "bfloat16") if out == "float16" or decays != (_NONE,)]
        for decay, fits, label in decays:
            for dtype, out in dtypes:
                types = dict.fromkeys(("y", "decay"), out) if out else {}
                recurrence = Recurrence(
                    form,
                    decay,
                    removal,
                    "kv_num_heads",
                    "q_num_heads//kv_num_heads",
                    {"k": "k", **names, **absent},
                    fits=fits,
                    label=label + (f"to {out}, " if out else ""),
                    types=types,
                )
                result += recurrence_plans(recurrence, dtype)
    return tuple(result)
