# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Normalised linear attention as a quick plugin of TensorRT 11: both sums in one launch.

A program has a head and a block of its values; it goes over the keys, then over the queries. The GPU part splits the tokens over programs,
and needs memory between its launches for that, which such a plugin has none of.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from ...op import OPS
from ..gpu.plan import Launch, Plan
from ..plugin import quick


@triton.jit
def quick_normalized_linear_attention(
    q,
    k,
    v,
    length,
    tokens,
    key,
    value,
    y,
    num_heads,
    eps,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: a batch and head (axis 0), VALUE values (axis 1). float32 sums."""
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    i = tl.arange(0, KEY)
    j = tl.program_id(1) * VALUE + tl.arange(0, VALUE)
    known = (i < key)[None, :]
    wanted = (j < value)[None, :]
    sums = tl.zeros((KEY, VALUE), tl.float32)
    normaliser = tl.zeros((KEY,), tl.float32)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        row = (batch * tokens + token)[:, None] * num_heads + head
        inside = (token < tokens)[:, None]
        features = tl.maximum(tl.load(k + row * key + i[None, :], mask=inside & known, other=0.0).to(tl.float32), 0.0)
        values = tl.load(v + row * value + j[None, :], mask=inside & wanted, other=0.0).to(tl.float32)
        sums = tl.dot(tl.trans(features), values, sums, input_precision="ieee")
        normaliser += tl.sum(features, axis=0)
    for first in range(0, length, TOKENS):
        token = first + tl.arange(0, TOKENS)
        row = (batch * length + token)[:, None] * num_heads + head
        inside = (token < length)[:, None]
        features = tl.maximum(tl.load(q + row * key + i[None, :], mask=inside & known, other=0.0).to(tl.float32), 0.0)
        below = tl.sum(features * normaliser[None, :], axis=1) + eps
        result = tl.dot(features, sums, input_precision="ieee") / below[:, None]
        tl.store(y + row * value + j[None, :], result.to(y.dtype.element_ty), mask=inside & wanted)


@functools.cache
def plans() -> tuple[Plan, ...]:
    """By the size of the keys, padded to a tile."""
    return tuple(
        Plan(
            f"key to {size}",
            "NormalizedLinearAttention",
            dtype,
            (
                Launch(
                    quick_normalized_linear_attention,
                    ("batch * num_heads", "cdiv(value, 16)", "1"),
                    {"KEY": size, "VALUE": 16, "TOKENS": 64},
                ),
            ),
            fits=f"key <= {size}",
        )
        for dtype in ("float32", "float16", "bfloat16")
        for size in (16, 32, 64, 128)
    )


def register(architecture: str) -> None:
    """Registers the plugin with TensorRT: see `quick.register`."""
    quick.register(OPS["normalized_linear_attention"], plans(), architecture)
