# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Normalised linear attention on a GPU, in three passes, each parallel over the tokens.

`key_value_sums`: phi(K)^T V and phi(K)^T 1 of stretches of tokens. `total_sums`: their sums, in a fixed order. `normalized_outputs`:
phi(Q) S / (phi(Q) z + eps). Sums, normaliser and epsilon are float32. Activations are multiplied by tensor cores in their dtype; S as the
sum of two numbers of it, for float16 after division by a power of two, because sums leave its range. float32 activations are split into two
TF32 numbers each, and the product of the small parts is left out (2^-22 of the product).
"""

import functools

import triton
import triton.language as tl

from ..gpu.plan import Launch, Plan, Workspace
from ..recurrence_gpu.products import exact_dot, left_dot

TENSOR_CORES = True
"""Whether the kernels for float16 and bfloat16 are to use tensor cores."""

_TILE = 64  # tokens
_STRETCH = 8  # tiles that a program sums


@triton.jit
def key_value_sums(
    k,
    v,
    sums,
    normalizers,
    tokens,
    stretches,
    num_heads,
    key,
    value,
    TILE: tl.constexpr,
    STRETCH: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Of each stretch of STRETCH * TILE tokens: sums (batch, heads, stretches, key, value), normalizers (batch, heads, stretches, key).

    Grid: (stretches, batch * heads, blocks of key * blocks of value).
    """
    stretch = tl.program_id(0)
    series = tl.program_id(1)
    value_block = tl.program_id(2) % tl.cdiv(value, BV)
    columns = tl.program_id(2) // tl.cdiv(value, BV) * BK + tl.arange(0, BK)
    value_columns = value_block * BV + tl.arange(0, BV)
    in_key = (columns < key)[None, :]
    in_value = (value_columns < value)[None, :]
    i = tl.arange(0, TILE)[:, None]
    token = (series // num_heads).to(tl.int64) * tokens
    head = series % num_heads
    total = tl.zeros((BK, BV), tl.float32)
    normalizer = tl.zeros((BK,), tl.float32)
    for tile in range(STRETCH):
        start = (stretch * STRETCH + tile) * TILE
        rows = i < tokens - start
        k_at = ((token + start) * num_heads + head) * key + (i * (num_heads * key) + columns[None, :])
        v_at = ((token + start) * num_heads + head) * value + (i * (num_heads * value) + value_columns[None, :])
        features = tl.load(k + k_at, mask=rows & in_key, other=0.0)
        features = tl.where(features > 0, features, 0.0).to(k.dtype.element_ty)
        v_rows = tl.load(v + v_at, mask=rows & in_value, other=0.0)
        total += exact_dot(tl.trans(features), v_rows, k.dtype.element_ty)
        normalizer += tl.sum(features.to(tl.float32), 0)
    place = series.to(tl.int64) * stretches + stretch
    inside = (columns < key)[:, None] & in_value
    tl.store(sums + place * key * value + (columns[:, None] * value + value_columns[None, :]), total, mask=inside)
    tl.store(normalizers + place * key + columns, normalizer, mask=(columns < key) & (value_block == 0))


@triton.jit
def total_sums(sums, totals, stretches, size, B: tl.constexpr):
    """Sums over the stretches: totals (batch, heads, size). Grid: (blocks of size, batch * heads)."""
    series = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * B + tl.arange(0, B)
    total = tl.zeros((B,), tl.float32)
    for stretch in range(stretches):
        total += tl.load(sums + (series * stretches + stretch) * size + i, mask=i < size, other=0.0)
    tl.store(totals + series * size + i, total, mask=i < size)


@triton.jit
def normalized_outputs(
    q,
    sum_totals,
    normalizer_totals,
    y,
    eps,
    length,
    num_heads,
    key,
    value,
    TILE: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Y of a tile of tokens. Grid: (tiles, batch * heads, blocks of value)."""
    start = tl.program_id(0) * TILE
    series = tl.program_id(1)
    value_columns = tl.program_id(2) * BV + tl.arange(0, BV)
    in_value = (value_columns < value)[None, :]
    i = tl.arange(0, TILE)[:, None]
    rows = i < length - start
    token = (series // num_heads).to(tl.int64) * length + start
    head = series % num_heads
    result = tl.zeros((TILE, BV), tl.float32)
    normalizer = tl.zeros((TILE,), tl.float32)
    for first in range(0, key, BK):
        columns = first + tl.arange(0, BK)
        q_at = (token * num_heads + head) * key + (i * (num_heads * key) + columns[None, :])
        features = tl.load(q + q_at, mask=rows & (columns < key)[None, :], other=0.0)
        features = tl.where(features > 0, features, 0.0).to(q.dtype.element_ty)
        s_at = series.to(tl.int64) * key * value + (columns[:, None] * value + value_columns[None, :])
        sums = tl.load(sum_totals + s_at, mask=(columns < key)[:, None] & in_value, other=0.0)
        result += left_dot(features, sums, q.dtype.element_ty)
        z = tl.load(normalizer_totals + series.to(tl.int64) * key + columns, mask=columns < key, other=0.0)
        normalizer += tl.sum(features.to(tl.float32) * z[None, :], 1)
    # A row of zeros beyond the length would be 0 / 0 if eps is 0.
    divisor = tl.where(rows, normalizer[:, None] + eps, 1.0)
    to = y + (token * num_heads + head) * value + (i * (num_heads * value) + value_columns[None, :])
    tl.store(to, (result / divisor).to(y.dtype.element_ty), mask=rows & in_value)


@functools.cache
def plans() -> tuple[Plan, ...]:
    """Every plan, the preferred ones first."""
    aligned = ("aligned", 64, frozenset({"key", "value"}), "key % 16 == 0 and value % 16 == 0", "key > 16 or value > 16")
    shapes: tuple[tuple[str, int, frozenset[str], str, str], ...] = (aligned, ("any", 16, frozenset(), "1", "1"))
    return tuple(_plan(dtype, *shape) for dtype in ("float32", "float16", "bfloat16") for shape in shapes)


def _plan(dtype: str, name: str, block: int, divisible: frozenset[str], fits: str, prefer: str) -> Plan:
    heads = "batch*num_heads"
    tile = {"TILE": _TILE, "BK": block, "BV": block}
    launches = (
        Launch(
            key_value_sums,
            ("stretches", heads, f"cdiv(key, {block})*cdiv(value, {block})"),
            tile | {"STRETCH": _STRETCH},
            warps=8,
            stages=2,
            divisible=divisible,
        ),
        Launch(
            total_sums,
            ("cdiv(key*value, 256)", heads, "1"),
            {"B": 256},
            {"totals": "sum_totals", "size": "key*value"},
            divisible=frozenset({"size"} if divisible else ()),
        ),
        Launch(
            total_sums,
            ("cdiv(key, 256)", heads, "1"),
            {"B": 256},
            {"sums": "normalizers", "totals": "normalizer_totals", "size": "key"},
            divisible=frozenset({"size"} if divisible else ()),
        ),
        Launch(normalized_outputs, (f"cdiv(length, {_TILE})", heads, f"cdiv(value, {block})"), tile, warps=8, divisible=divisible),
    )
    workspace = (
        Workspace("sums", "float32", ("batch", "num_heads", "stretches", "key", "value")),
        Workspace("normalizers", "float32", ("batch", "num_heads", "stretches", "key")),
        Workspace("sum_totals", "float32", ("batch", "num_heads", "key", "value")),
        Workspace("normalizer_totals", "float32", ("batch", "num_heads", "key")),
    )
    sizes = {"stretches": f"cdiv(tokens, {_TILE * _STRETCH})"}
    return Plan(name, "NormalizedLinearAttention", dtype, launches, sizes, workspace, fits, prefer)
