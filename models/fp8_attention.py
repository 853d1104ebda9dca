"""Softmax attention with the numbers of FlashAttention-3's FP8 forward pass (Shah et al., arXiv:2407.08608, section 3.3).

Queries, keys and values are rounded to E4M3 before their products, which accumulate in float32. Two things keep the error small where
activations have outliers:

- **Block quantisation.** Each block of `block_size` tokens of a head has a scale of its own, max |x| / 448; per-tensor FP8 has one for
  all heads and tokens.
- **Incoherent processing.** Queries and keys are multiplied by the same random orthogonal matrix M = diag(±1) H / sqrt(d), with H
  Hadamard's. (Q M)(K M)^T = Q K^T, and an outlier in one channel is spread over all d of them.

The probabilities are rounded too: exp(s - max s), times 256, which a row's largest score makes 256. Here max is the row's; the kernel's
is the largest of the blocks that it has read, so that its roundings of P differ from these by the online rescaling.

This is a model of the arithmetic, which every target computes: E4M3 is emulated by exponent and `round`, exactly (see `round_to_e4m3`). It
says what FP8 attention does to a network's accuracy on a machine that has no FP8, and it runs no faster than softmax attention: the
speed is that of the kernel. The settings `block_size=0` and `incoherent=False` give per-tensor FP8, the paper's baseline. The survey's
2.6 times smaller error is the paper's table 3, on values of which one in a thousand is an outlier, and holds here for heads of 256 and
2048 tokens; it grows with both, from 1.5 times for heads of 64 and 512 tokens (`tests/models/test_fp8_attention.py`). Most of it is the
rotation's: on such values, E4M3 has exponents enough for one scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, Tolerance, register_model

E4M3_MAX = 448.0
_SMALLEST_EXPONENT = -6  # below 2^-6 the numbers of E4M3 are 2^-9 apart, like those above it
_MANTISSA_BITS = 3
_PEAK = 256.0  # of the probabilities: a power of two, so that it rounds nothing by itself


@dataclass(frozen=True)
class FP8AttentionConfig:
    """Settings of a block of FP8 attention.

    Attributes:
        hidden_size: Channels of a token.
        num_heads: Heads.
        head_dim: Channels of a head; a power of two, as Hadamard's matrix is.
        block_size: Tokens that share a scale; 0 for one scale for everything.
        incoherent: Rotate queries and keys by a random Hadamard matrix.
        causal: A token sees itself and those before it.
        seed: Of the signs of the rotation.
    """

    hidden_size: int = 2048
    num_heads: int = 16
    head_dim: int = 128
    block_size: int = 128
    incoherent: bool = True
    causal: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.block_size < 0:
            raise ValueError(f"block_size must be at least 0, got {self.block_size}")
        if self.head_dim & (self.head_dim - 1):
            raise ValueError(f"head_dim must be a power of two, got {self.head_dim}")


def round_to_e4m3(x: Tensor) -> Tensor:
    """The numbers of FP8 E4M3 that are nearest to x, ties to even, saturating at 448; float32 in and out.

    `floor(log2 |x|)` may be off by one where |x| is within a rounding of a power of two, and both steps lead to that power then.
    """
    x = x.clamp(-E4M3_MAX, E4M3_MAX)
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**_SMALLEST_EXPONENT)))
    step = torch.exp2(exponent - _MANTISSA_BITS)
    return torch.round(x / step) * step


def hadamard(size: int, seed: int) -> Tensor:
    """diag(±1) H / sqrt(size), orthogonal, (size, size) float32 on the CPU; H is Sylvester's, the signs are numpy's PCG64(seed)."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    signs = np.random.Generator(np.random.PCG64(seed)).choice([-1.0, 1.0], size)
    out: Tensor = (torch.from_numpy(signs)[:, None] * matrix / size**0.5).float()
    return out


def quantise(x: Tensor, block_size: int) -> Tensor:
    """Rounds to E4M3 times a scale, (B, heads, L, d) to the same.

    Args:
        x: float32.
        block_size: Tokens that share a scale, for each head; 0 for one scale for all of x.
    """
    if block_size:
        length = x.shape[2]
        # One block more than there are, and two for no token: torch.export takes an axis that may be 1 for another program.
        blocks = length // block_size + 2
        peaks = x.abs().amax(-1)
        zeros = torch.zeros_like(peaks[:, :, :1]).expand(-1, -1, blocks * block_size - length)
        peak = (
            torch.cat([peaks, zeros], dim=-1)
            .reshape(*peaks.shape[:2], blocks, block_size)
            .amax(-1, keepdim=True)
            .expand(-1, -1, -1, block_size)
        )
        peak = peak.flatten(2)[:, :, :length].unsqueeze(-1)
    else:
        peak = x.abs().amax()
    scale = peak.clamp(min=1e-20) / E4M3_MAX
    out: Tensor = round_to_e4m3(x / scale) * scale
    return out


def fp8_attention(q: Tensor, k: Tensor, v: Tensor, *, block_size: int, rotation: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with every factor rounded to E4M3, (B, heads, L, d) each."""
    if rotation is not None:
        q, k = q @ rotation, k @ rotation
    scores = quantise(q, block_size) @ quantise(k, block_size).transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        places = torch.arange(q.shape[2], device=q.device)
        scores = scores.masked_fill(places > places[:, None], -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return round_to_e4m3(weights * _PEAK) / _PEAK @ quantise(v, block_size) / weights.sum(-1, keepdim=True)


class FP8Attention(nn.Module):
    """A block of attention: projections, FP8 attention, projection. Parameters have the names of `softmax-attention`'s."""

    rotation: Tensor | None

    def __init__(self, config: FP8AttentionConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        rotation = hadamard(config.head_dim, config.seed) if config.incoherent else None
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes tokens (B, L, hidden_size) to the same, float32."""
        q, k, v = (layer(x).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        y = fp8_attention(q, k, v, block_size=self.config.block_size, rotation=self.rotation, causal=self.config.causal)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


@register_model(
    "fp8-attention-tiny",
    FP8AttentionConfig(hidden_size=32, num_heads=2, head_dim=16, block_size=4),
    summary="Attention in emulated FP8 with 2 heads and blocks of 4 tokens, for trying",
)
@register_model(
    "fp8-attention-2048",
    FP8AttentionConfig(),
    summary="Attention in emulated FP8, 16 heads of 128, the benchmark's shape of FlashAttention-3",
)
def fp8_attention_block(config: FP8AttentionConfig) -> ModelSpec:
    """A block of attention in FP8."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        shape = (sizes["batch"], sizes["length"], config.hidden_size)
        return {"x": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))}

    return ModelSpec(
        build=lambda: FP8Attention(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "length": 10},
        dynamic={"x": {0: "batch", 1: "length"}},
        ranges={"batch": SizeRange(1, 2, 16), "length": SizeRange(1, 10, 8192)},
        outputs=("y",),
        # What half precision moves across a tie becomes the next number of E4M3, 2^-4 away; an average over keys leaves some 2^-6. bf16
        # moves eight times as much across.
        tolerances={"fp16": Tolerance(min_psnr=50.0, max_relative=0.02), "bf16": Tolerance(min_psnr=45.0, max_relative=0.03)},
        source="Shah et al., FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision, arXiv:2407.08608",
    )
