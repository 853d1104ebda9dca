# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The selective scan on a GPU: one thread a channel, chunks of the sequence side by side.

Its bound is the throughput of exponentials: one for each token, channel and state, 16 a clock on a multiprocessor (A is scaled by log2(e),
so that each is one instruction). All else is kept near that: a warp has 32 channels, and a thread has all states of its channel in
registers, so that the sum over the states needs no exchange, activations are read and written coalesced, and B and C are the warp's.

Short of channels, a scan in one piece would leave most of the GPU idle. The sequence is cut into as many chunks as fill it:

1. `scan_ends`: each chunk's last state from zeros, and its sum of delta, which is the logarithm of its decay divided by A;
2. `scan_carry`: from the initial state through these to each chunk's first state;
3. `scan_chunks`: each chunk again, from its first state, with its outputs.

That costs twice the exponentials, so that it is for few channels and small batches alone. Extra memory is (batch, chunks, state, channels)
float32, and the number of chunks falls as the batch and the channels grow: it never exceeds that of `WARPS` warps of states.
"""

import functools

import triton
import triton.language as tl

from ..gpu.plan import Launch, Plan, Workspace

TENSOR_CORES = False

_DTYPES = ("float32", "float16", "bfloat16")

ROWS = 4
"""Chunks, and so warps, of a program."""

WARPS = 2112
"""Warps that fill an H100: 132 multiprocessors, 16 each."""

ENOUGH = 528
"""Warps from which on one pass is predicted to beat two: one for each of 4 schedulers of 132 multiprocessors."""

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to float32's precision also where it is small.

    With e = exp(-|x|), log(1 + e) = 2 atanh(e / (2 + e)), whose argument is at most 1/3: of its series, the first term that is left out is
    below 2e-8 of the sum.
    """
    e = tl.exp2(-tl.abs(x) * _LOG2E)
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def _tokens(row, chunk, chunks, length, reverse):
    """For each row, which is a chunk of a batch: its first token in the order of the scan, and that token's place in (batch, length)."""
    first = (row % chunks) * chunk
    token = (row // chunks).to(tl.int64) * length + first
    if reverse:
        token += length - 1 - 2 * first
    return first, token


@triton.jit
def scan_ends(
    u,
    delta,
    A,
    B,
    delta_bias,
    ends,  # (rows, state, channels): h after the chunk, from zeros
    sums,  # (rows, channels): of delta over the chunk
    rows,  # batch * chunks
    length,
    channels,
    groups,
    parts,  # state / MULTIPLE
    chunk,
    chunks,
    delta_softplus,
    reverse,
    one,
    STATE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: CHANNELS channels of one group, of ROWS chunks."""
    width = channels // groups
    blocks = tl.cdiv(width, CHANNELS)
    group = tl.program_id(0) // blocks
    within = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    # Beyond the edges the last channel and the last row are computed again, and not written: no load needs a mask.
    channel = group * width + tl.minimum(within, width - 1)
    # The second axis of the tiles, a warp each: rows, each in PARTS of its states.
    j = tl.arange(0, ROWS * PARTS)
    place = tl.program_id(1) * ROWS + j // PARTS
    row = tl.minimum(place, rows - 1)
    n = (j % PARTS * STATE)[None, :] + tl.arange(0, STATE)[:, None]
    # That of which the number of states is a multiple tells the compiler how wide it can load.
    stride = STATE * PARTS if MULTIPLE == STATE * PARTS else parts * MULTIPLE
    known = n < stride
    inside = (place < rows)[:, None] & (within < width)[None, :]
    first, token = _tokens(row, chunk, chunks, length, reverse)
    u_at = u + token[:, None] * channels + channel[None, :]
    delta_at = delta + token[:, None] * channels + channel[None, :]
    B_at = B + (token * (groups * stride) + group * stride)[None, :] + n
    forward = 1 - 2 * reverse
    # `one` is 1, which the compiler does not know: it keeps the tile's layout along the channels, where it would follow A's rows.
    if PARTS == 1:  # the same for every row: fewer registers
        i = tl.arange(0, STATE)[:, None]
        a = tl.load(A + (channel * stride)[None, :] + i * one, mask=i < stride, other=0.0)[:, None, :] * _LOG2E
    else:
        a = tl.load(A + (channel * stride)[None, None, :] + (n * one)[:, :, None], mask=known[:, :, None], other=0.0) * _LOG2E
    bias = tl.load(delta_bias + channel)[None, :]
    h = tl.zeros((STATE, ROWS * PARTS, CHANNELS), tl.float32)
    total = tl.zeros((ROWS * PARTS, CHANNELS), tl.float32)
    u_t = tl.load(u_at)
    delta_t = tl.load(delta_at)
    B_t = tl.load(B_at, mask=known, other=0.0)
    left = tl.minimum(length - first, chunk)
    for t in tl.range(chunk, loop_unroll_factor=UNROLL):
        x = u_t.to(tl.float32)
        d = delta_t.to(tl.float32) + bias
        b = B_t.to(tl.float32)
        # The next token is on its way while this one is computed; at the end it is the same token again.
        move = tl.where(t + 1 < left, forward, 0)
        u_at += (move * channels)[:, None]
        delta_at += (move * channels)[:, None]
        B_at += (move * (groups * stride))[None, :]
        u_t = tl.load(u_at)
        delta_t = tl.load(delta_at)
        B_t = tl.load(B_at, mask=known, other=0.0)
        if delta_softplus:
            d = _softplus(d)
        d = tl.where((t < left)[:, None], d, 0.0)
        total += d
        h = tl.exp2(d[None, :, :] * a) * h + (d * x)[None, :, :] * b[:, :, None]
    tl.store(sums + row.to(tl.int64)[:, None] * channels + channel[None, :], total, mask=inside & (j % PARTS == 0)[:, None])
    to = (row.to(tl.int64) * (channels * stride))[:, None] + channel[None, :]
    tl.store(ends + to[None, :, :] + (n * channels)[:, :, None], h, mask=known[:, :, None] & inside[None, :, :])


@triton.jit
def scan_carry(A, initial_state, ends, sums, channels, state, chunks, BLOCK: tl.constexpr):
    """Replaces the chunks' ends by their first states, in place. One program: BLOCK pairs of state and channel, through all chunks."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = channels * state
    inside = i < size
    n = i // channels
    channel = i % channels
    batch = tl.program_id(1).to(tl.int64)
    a = tl.load(A + channel * state + n, mask=inside, other=0.0) * _LOG2E
    h = tl.load(initial_state + batch * size + channel * state + n, mask=inside, other=0.0)
    ends_at = ends + batch * chunks * size + i
    sums_at = sums + batch * chunks * channels + channel
    for c in range(0, chunks, 4):
        # The loads of four chunks are in flight together.
        mask_1 = inside & (c + 1 < chunks)
        mask_2 = inside & (c + 2 < chunks)
        mask_3 = inside & (c + 3 < chunks)
        end_0 = tl.load(ends_at, mask=inside, other=0.0)
        end_1 = tl.load(ends_at + size, mask=mask_1, other=0.0)
        end_2 = tl.load(ends_at + 2 * size, mask=mask_2, other=0.0)
        end_3 = tl.load(ends_at + 3 * size, mask=mask_3, other=0.0)
        sum_0 = tl.load(sums_at, mask=inside, other=0.0)
        sum_1 = tl.load(sums_at + channels, mask=mask_1, other=0.0)
        sum_2 = tl.load(sums_at + 2 * channels, mask=mask_2, other=0.0)
        sum_3 = tl.load(sums_at + 3 * channels, mask=mask_3, other=0.0)
        tl.store(ends_at, h, mask=inside)
        h = tl.exp2(a * sum_0) * h + end_0
        tl.store(ends_at + size, h, mask=mask_1)
        h = tl.exp2(a * sum_1) * h + end_1
        tl.store(ends_at + 2 * size, h, mask=mask_2)
        h = tl.exp2(a * sum_2) * h + end_2
        tl.store(ends_at + 3 * size, h, mask=mask_3)
        h = tl.exp2(a * sum_3) * h + end_3
        ends_at += 4 * size
        sums_at += 4 * channels


@triton.jit
def scan_chunks(
    u,
    delta,
    A,
    B,
    C,
    D,
    delta_bias,
    z,
    starts,  # h before each chunk
    y,
    last_state,  # (batch, channels, state)
    rows,  # batch * chunks
    length,
    channels,
    groups,
    parts,  # state / MULTIPLE
    chunk,
    chunks,
    delta_softplus,
    reverse,
    one,
    starts_channel,  # strides of starts, whose first axis is rows
    starts_state,
    gated,  # whether there is z, which else is any activation
    STATE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: CHANNELS channels of one group, of ROWS chunks, with their outputs; a batch's last chunk also writes its last state."""
    width = channels // groups
    blocks = tl.cdiv(width, CHANNELS)
    group = tl.program_id(0) // blocks
    within = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    channel = group * width + tl.minimum(within, width - 1)
    # The second axis of the tiles, a warp each: rows, each in PARTS of its states.
    j = tl.arange(0, ROWS * PARTS)
    place = tl.program_id(1) * ROWS + j // PARTS
    row = tl.minimum(place, rows - 1)
    inside = (place < rows)[:, None] & (within < width)[None, :]
    n = (j % PARTS * STATE)[None, :] + tl.arange(0, STATE)[:, None]
    # That of which the number of states is a multiple tells the compiler how wide it can load.
    stride = STATE * PARTS if MULTIPLE == STATE * PARTS else parts * MULTIPLE
    known = n < stride
    first, token = _tokens(row, chunk, chunks, length, reverse)
    at = token[:, None] * channels + channel[None, :]
    matrix_at = (token * (groups * stride) + group * stride)[None, :] + n
    u_at = u + at
    delta_at = delta + at
    z_at = z + at
    y_at = y + at
    B_at = B + matrix_at
    C_at = C + matrix_at
    forward = 1 - 2 * reverse
    if PARTS == 1:  # the same for every row: fewer registers
        i = tl.arange(0, STATE)[:, None]
        a = tl.load(A + (channel * stride)[None, :] + i * one, mask=i < stride, other=0.0)[:, None, :] * _LOG2E
    else:
        a = tl.load(A + (channel * stride)[None, None, :] + (n * one)[:, :, None], mask=known[:, :, None], other=0.0) * _LOG2E
    bias = tl.load(delta_bias + channel)[None, :]
    skip = tl.load(D + channel)[None, :]
    start = (row.to(tl.int64) * (channels * stride))[:, None] + (channel * starts_channel)[None, :]
    h = tl.load(starts + start[None, :, :] + (n * starts_state)[:, :, None], mask=known[:, :, None], other=0.0)
    u_t = tl.load(u_at)
    delta_t = tl.load(delta_at)
    B_t = tl.load(B_at, mask=known, other=0.0)
    C_t = tl.load(C_at, mask=known, other=0.0)
    z_t = tl.load(z_at)
    left = tl.minimum(length - first, chunk)
    for t in tl.range(chunk, loop_unroll_factor=UNROLL):
        x = u_t.to(tl.float32)
        d = delta_t.to(tl.float32) + bias
        b = B_t.to(tl.float32)
        c = C_t.to(tl.float32)
        gate = z_t.to(tl.float32)
        alive = (t < left)[:, None]
        # The next token is on its way while this one is computed; at the end it is the same token again.
        move = tl.where(t + 1 < left, forward, 0)
        u_at += (move * channels)[:, None]
        delta_at += (move * channels)[:, None]
        B_at += (move * (groups * stride))[None, :]
        C_at += (move * (groups * stride))[None, :]
        u_t = tl.load(u_at)
        delta_t = tl.load(delta_at)
        B_t = tl.load(B_at, mask=known, other=0.0)
        C_t = tl.load(C_at, mask=known, other=0.0)
        if gated:
            z_at += (move * channels)[:, None]
            z_t = tl.load(z_at)
        if delta_softplus:
            d = _softplus(d)
        d = tl.where(alive, d, 0.0)
        h = tl.exp2(d[None, :, :] * a) * h + (d * x)[None, :, :] * b[:, :, None]
        out = tl.sum(h * c[:, :, None], axis=0)
        if PARTS > 1:
            out = tl.sum(out, axis=0, keep_dims=True)
        out += skip * x
        if gated:
            out *= gate / (1.0 + tl.exp2(-(gate * _LOG2E)))
        tl.store(y_at, out.to(y.dtype.element_ty), mask=inside & alive & (j % PARTS == 0)[:, None])
        y_at += (move * channels)[:, None]
    end = (row // chunks).to(tl.int64)[:, None] * (channels * stride) + (channel * stride)[None, :]
    ends_here = inside & (first + chunk >= length)[:, None]
    tl.store(last_state + end[None, :, :] + (n * one)[:, :, None], h, mask=known[:, :, None] & ends_here[None, :, :])


@functools.cache
def plans() -> tuple[Plan, ...]:
    """By states, padded to a tile; one pass where batch and channels fill the GPU or there is little to cut, else three."""
    result: list[Plan] = []
    for form, gated in (("SelectiveScan", False), ("GatedSelectiveScan", True)):
        for dtype in _DTYPES:
            for name, size, parts, multiple, fits in (
                ("state 16", 16, 1, 16, "state == 16"),
                ("state to 8", 8, 1, 1, "state <= 8"),
                ("state to 64", 16, 4, 8, "state <= 64 and state % 8 == 0"),
                ("state to 256", 32, 8, 1, "state <= 256"),
            ):
                result += _plans(name, form, dtype, fits, size, parts, multiple, gated=gated)
    return tuple(result)


def _plans(name: str, form: str, dtype: str, fits: str, size: int, parts: int, multiple: int, *, gated: bool) -> tuple[Plan, Plan]:
    # A thread has 16 states, or 32; more are spread over the warps of a program, which add their sums at every token.
    rows = ROWS if parts == 1 else 1
    constants: dict[str, int | bool | str] = {"STATE": size, "MULTIPLE": multiple, "PARTS": parts, "ROWS": rows, "CHANNELS": 32}
    constants["UNROLL"] = 2 if parts == 1 else 1
    warps = rows * parts
    blocks = "groups * cdiv(channels // groups, 32)"
    grid = (blocks, f"cdiv(batch * chunks, {rows})", "1")
    shared = {"one": "1", "rows": "batch * chunks", "parts": f"state // {multiple}"}

    def last(**rename: str) -> Launch:
        return Launch(scan_chunks, grid, constants, {**shared, "z": "z" if gated else "u", "gated": str(int(gated)), **rename}, warps)

    whole = Plan(
        f"{name}, whole",
        form,
        dtype,
        launches=(last(starts="initial_state", starts_channel="state", starts_state="1"),),
        sizes={"chunks": "1", "chunk": "length"},
        fits=fits,
        prefer=f"batch >= {rows} and batch * {blocks} >= {ENOUGH} or length < 128",
    )
    chunked = Plan(
        f"{name}, chunked",
        form,
        dtype,
        launches=(
            Launch(scan_ends, grid, constants, shared, warps),
            Launch(scan_carry, ("cdiv(channels * state, 128)", "batch", "1"), {"BLOCK": 128}),
            last(starts="ends", starts_channel="1", starts_state="channels"),
        ),
        sizes={
            # As many as fill the GPU, of 32 tokens at least; even, because the loop is unrolled by two.
            "chunk": f"2 * cdiv(length, 2 * max(1, min(cdiv({WARPS}, batch * {blocks}), length // 32)))",
            "chunks": "cdiv(length, chunk)",
            # TensorRT asks for the workspace once, for the largest sizes of a range. The chunks of a smaller batch or length may be more
            # than theirs; this bound of batch * chunks grows with both.
            "rows_most": f"min(cdiv({WARPS}, {blocks}) + batch, batch * max(1, length // 32))",
        },
        workspace=(
            Workspace("ends", "float32", ("rows_most", "state", "channels")),
            Workspace("sums", "float32", ("rows_most", "channels")),
        ),
        fits=fits,
    )
    return whole, chunked
