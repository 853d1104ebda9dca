"""Finite scalar quantisation: every channel of a latent is rounded to a few levels, and the codebook is their product.

Mentzer, Minnen, Agustsson and Tschannen, "Finite Scalar Quantization: VQ-VAE Made Simple", arXiv:2309.15505, appendix A.1. For a channel
with L levels

    half_l  = (L - 1) (1 + eps) / 2                  eps = 1e-3
    offset  = 1/2 if L is even, else 0
    bounded = tanh(z + atanh(offset / half_l)) half_l - offset
    code    = round(bounded) / floor(L / 2)          half-way values to the even integer, as torch.round and jnp.round do
    index   = sum_i (round(bounded_i) + floor(L_i / 2)) basis_i,      basis_i = L_0 ... L_(i-1)

so that round(bounded) takes exactly L values, also where L is even: -L/2 ... L/2 - 1, and codes lie in [-1, 1 - 2/L]. The survey's sketch
rounds (tanh(z) + 1) (L - 1) / 2 instead and spreads the levels evenly over [-1, 1]; then zero is no code where L is even. The half offset
is the paper's, and is what published code and weights use.

**No tanh is computed.** round(bounded(z)) is a staircase in z, so that the module keeps the L - 1 steps of each channel, and counts how
many of them z has reached. The steps are found by bisection over the float32 numbers in the formula above, every operation rounded to
float32 (tanh correctly), half-way values to even. What a target's tanh would make of its last bit would decide a half-way value;
comparisons of float32 numbers are the same on every target, and codes are equal bit for bit. Where another library's float32 tanh is off in
its last bit, its step may lie a few float32 numbers beside ours.

There is nothing to learn and the module has no parameters. The paper's projections to and from the network's width are layers of the
network around it. NaN gets the lowest level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..exporter.spec import Analysis, ModelSpec, SizeRange, register_model

_EPS = 1e-3


@dataclass(frozen=True)
class FSQConfig:
    """Settings of a finite scalar quantiser.

    Attributes:
        levels: Number of levels of each channel. Two levels are what the bounded tanh cannot give: it needs 3 or more.
        decode: Indices to codes instead of latents to codes and indices.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)
    decode: bool = False

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 3:
            raise ValueError(f"levels must be at least one number, each at least 3, got {self.levels}")
        if math.prod(self.levels) > 2**31 - 1:  # Core ML counts in 32 bits
            raise ValueError(f"the product of levels must be at most 2^31 - 1, got {math.prod(self.levels)}")


def bounded(z: np.ndarray[tuple[int, ...], np.dtype[np.float32]], levels: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The paper's bound of a channel, float32 in and out, every operation rounded to float32."""
    half_l = np.float32((levels - 1) * (1 + _EPS) / 2)
    offset = np.float32(0.5 if levels % 2 == 0 else 0.0)
    shift = np.float32(np.arctanh(np.float64(offset / half_l)))
    squashed: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = np.tanh((z + shift).astype(np.float64)).astype(np.float32)
    return squashed * half_l - offset


def steps(levels: int) -> list[float]:
    """The L - 1 float32 numbers at which a channel's level rises by one, ascending: the level of z is the number of steps <= z."""
    lowest, found = -(levels // 2), []
    for level in range(lowest + 1, lowest + levels):
        below, reached = _ordinal(-20.0), _ordinal(20.0)
        while reached - below > 1:
            middle = (below + reached) // 2
            if np.round(bounded(_float32(middle), levels))[0] >= level:
                reached = middle
            else:
                below = middle
        found.append(float(_float32(reached)[0]))
    return found


def _ordinal(value: float) -> int:
    """The place of a float32 number among all of them: neighbours differ by one, and zero is at 0."""
    bits = int(np.abs(np.float32(value)).view(np.int32))
    return -bits if value < 0 else bits


def _float32(ordinal: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The number at a place, (1,)."""
    magnitude = np.array([abs(ordinal)], np.int32).view(np.float32)
    return -magnitude if ordinal < 0 else magnitude


class FSQ(nn.Module):
    """The quantiser, both ways; see the module's text."""

    steps: Tensor
    half_width: Tensor
    scale: Tensor
    basis: Tensor
    levels: Tensor

    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        levels = config.levels
        table = np.full((len(levels), max(levels) - 1), np.inf, np.float32)  # no z reaches what a channel lacks
        for channel, count in enumerate(levels):
            table[channel, : count - 1] = steps(count)
        half = [count // 2 for count in levels]
        basis = [math.prod(levels[:channel]) for channel in range(len(levels))]
        with torch.device("cpu"):
            self.register_buffer("steps", torch.from_numpy(table), persistent=False)
            self.register_buffer("half_width", torch.tensor(half, dtype=torch.float32), persistent=False)
            self.register_buffer("scale", torch.tensor([1 / h for h in half], dtype=torch.float32), persistent=False)
            self.register_buffer("basis", torch.tensor(basis), persistent=False)
            self.register_buffer("levels", torch.tensor(levels), persistent=False)

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (..., d) float32 to codes (..., d) float32 and indices (...) int64."""
        level = (z.unsqueeze(-1) >= self.steps).float().sum(-1)
        indices = (level.long() * self.basis).sum(-1)
        return (level - self.half_width) * self.scale, indices

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (...) int64 in [0, product of levels) to codes (..., d) float32, those that `encode` gives."""
        # In integers, also where a target has no remainder of them: i mod L is i - (i // L) L.
        higher = indices.unsqueeze(-1) // self.basis
        level = higher - higher // self.levels * self.levels
        return (level.float() - self.half_width) * self.scale


class FSQEncoder(FSQ):
    """Latents to codes."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, N, d) float32 to codes (B, N, d) float32 and indices (B, N) int64."""
        return self.encode(z)


class FSQDecoder(FSQ):
    """Indices to codes."""

    def forward(self, indices: Tensor) -> Tensor:
        """Indices (B, N) int64 to codes (B, N, d) float32."""
        return self.decode(indices)


@register_model("fsq-tiny", FSQConfig(levels=(8, 6, 5)), summary="FSQ of 3 channels, 240 codes, for trying")
@register_model("fsq-decode-tiny", FSQConfig(levels=(8, 6, 5), decode=True), summary="The codes of fsq-tiny from their indices")
@register_model("fsq-8x6x5", FSQConfig(levels=(8, 6, 5)), summary="FSQ in place of a codebook of 2^8, 240 codes")
@register_model("fsq-8x5x5x5", FSQConfig(), summary="FSQ in place of a codebook of 2^10, 1000 codes")
@register_model("fsq-7x5x5x5x5", FSQConfig(levels=(7, 5, 5, 5, 5)), summary="FSQ in place of a codebook of 2^12, 4375 codes")
@register_model("fsq-8x8x8x6x5", FSQConfig(levels=(8, 8, 8, 6, 5)), summary="FSQ in place of a codebook of 2^14, 15360 codes")
@register_model("fsq-8x8x8x5x5x5", FSQConfig(levels=(8, 8, 8, 5, 5, 5)), summary="FSQ in place of a codebook of 2^16, 64000 codes")
@register_model("fsq-decode-8x5x5x5", FSQConfig(decode=True), summary="The 1000 codes of fsq-8x5x5x5 from their indices")
@register_model(
    "fsq-decode-8x8x8x6x5", FSQConfig(levels=(8, 8, 8, 6, 5), decode=True), summary="The 15360 codes of fsq-8x8x8x6x5 from their indices"
)
def fsq(config: FSQConfig) -> ModelSpec:
    """A finite scalar quantiser, of latents or of indices. A fifth of the example latents lie on a step or next to one."""
    channels = len(config.levels)

    def latents(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        z = (1.5 * rng.standard_normal((sizes["batch"], sizes["length"], channels))).astype(np.float32)
        for channel, count in enumerate(config.levels):
            table = np.array(steps(count), np.float32)
            near = np.stack([table, np.nextafter(table, np.float32(-np.inf)), np.nextafter(table, np.float32(np.inf))])
            chosen = rng.random(z.shape[:2]) < 0.2
            z[..., channel] = np.where(chosen, rng.choice(near.reshape(-1), z.shape[:2]), z[..., channel])
        return {"z": torch.from_numpy(z)}

    def indices(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"indices": torch.from_numpy(rng.integers(0, math.prod(config.levels), (sizes["batch"], sizes["length"])))}

    name = "indices" if config.decode else "z"
    return ModelSpec(
        build=lambda: (FSQDecoder if config.decode else FSQEncoder)(config).eval(),
        inputs=indices if config.decode else latents,
        sizes={"batch": 2, "length": 64},
        dynamic={name: {0: "batch", 1: "length"}},
        ranges={"batch": SizeRange(1, 2, 16), "length": SizeRange(1, 64, 4096)},
        outputs=("codes",) if config.decode else ("codes", "indices"),
        source="Mentzer et al., Finite Scalar Quantization: VQ-VAE Made Simple, arXiv:2309.15505; checked against vector-quantize-pytorch",
        analyses=()
        if config.decode
        else (
            Analysis("entropy", outputs=("indices",), settings={"size": math.prod(config.levels)}),
            Analysis("mutual-information", inputs=("z",), outputs=("codes",), settings={"vectors": True}),
        ),
    )
