# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The causal convolution on a GPU: tiles of channels and tokens, bound by memory.

Every element of x is loaded once from device memory, and from L1 for the other taps. Any width: the taps are unrolled by four.
"""

import functools

import triton
import triton.language as tl

from ..gpu.plan import Launch, Plan

TENSOR_CORES = False

_DTYPES = ("float32", "float16", "bfloat16")


@triton.jit
def causal_conv1d(
    x,
    weight,
    bias,
    initial_state,
    y,
    last_state,
    rows,  # batch * channels
    channels,
    length,
    width,
    silu,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One tile of ROWS rows, which are batches and channels, and TOKENS tokens. float32 sums; the carry is copied as it is."""
    blocks = tl.cdiv(length, TOKENS)
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) % blocks
    inside = (row < rows)[:, None]
    channel = row % channels
    x_row = x + row.to(tl.int64)[:, None] * length
    state_row = initial_state + row.to(tl.int64)[:, None] * (width - 1)
    token = (block * TOKENS + tl.arange(0, TOKENS))[None, :]
    total = tl.zeros((ROWS, TOKENS), tl.float32) + tl.load(bias + channel, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    for first in range(0, width, 4):
        for unrolled in tl.static_range(4):
            tap = first + unrolled
            source = token + (tap - (width - 1))
            used = inside & (tap < width) & (token < length)
            value = tl.load(x_row + source, mask=used & (source >= 0), other=0.0).to(tl.float32)
            value += tl.load(state_row + (token + tap), mask=used & (source < 0), other=0.0).to(tl.float32)
            factor = tl.load(weight + channel * width + tap, mask=(row < rows) & (tap < width), other=0.0).to(tl.float32)
            total += factor[:, None] * value
    total = tl.where(silu != 0, total * tl.sigmoid(total), total)
    tl.store(y + row.to(tl.int64)[:, None] * length + token, total.to(y.dtype.element_ty), mask=inside & (token < length))
    if block == 0:
        for first in range(0, width - 1, 4):
            place = (first + tl.arange(0, 4))[None, :]
            source = length - (width - 1) + place
            used = inside & (place < width - 1)
            from_x = tl.load(x_row + source, mask=used & (source >= 0), other=0.0)
            from_state = tl.load(state_row + (length + place), mask=used & (source < 0), other=0.0)
            tl.store(last_state + row.to(tl.int64)[:, None] * (width - 1) + place, tl.where(source >= 0, from_x, from_state), mask=used)


@functools.cache
def plans() -> tuple[Plan, ...]:
    """Wide tiles for short sequences, where rows are neighbours in memory, and long tiles for long ones."""
    return tuple(
        Plan(
            name,
            "CausalConv1d",
            dtype,
            launches=(
                Launch(
                    causal_conv1d,
                    (f"cdiv(batch * channels, {rows}) * cdiv(length, {tokens})", "1", "1"),
                    {"ROWS": rows, "TOKENS": tokens},
                    rename={"rows": "batch * channels"},
                ),
            ),
            prefer=prefer,
        )
        for dtype in _DTYPES
        for name, rows, tokens, prefer in (("short", 64, 16, "length <= 32"), ("long", 4, 256, "1"))
    )
