"""What several of the architectures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np

    from ..exporter.spec import Arrays


def timestep_embedding(t: Tensor, dim: int, *, frequency_shift: int = 0, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of geometrically spaced frequencies, cosines first (Vaswani et al., arXiv:1706.03762, as used by DiT's and SANA's code).

    Frequency i of n = dim / 2 is max_period^(-i / (n - frequency_shift)). The frequencies are computed here and not kept in a buffer,
    so that a module cast to half precision does not round them: a relative error of 2^-11 in a frequency is half a radian at t = 1000.

    Args:
        t: (B,), any real values.
        dim: Size of the embedding, even.
        frequency_shift: 0 in DiT's and SANA's code; 1 makes the last frequency exactly 1 / max_period, as in Ho et al.'s DDPM code and in
            diffusers' DiT.
        max_period: The longest period is 2 pi times this.

    Returns:
        (B, dim), float32.
    """
    half = dim // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - frequency_shift)
    angles = t.float()[:, None] * torch.exp(exponents)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep through a two-layer MLP: (B,) to (B, hidden_size)."""

    def __init__(self, hidden_size: int, *, frequencies: int = 256, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps t (B,) to (B, hidden_size), in the weights' dtype."""
        embedding = timestep_embedding(t, self.frequencies, frequency_shift=self.frequency_shift)
        out: Tensor = self.mlp(embedding.to(next(self.mlp.parameters()).dtype))
        return out


class LabelEmbedder(nn.Module):
    """A vector for each class, and one more, the last, for "no class" (classifier-free guidance): (B,) int64 to (B, hidden_size).

    The published code replaces a tenth of the labels by the null class while training; here the training script does that, so that
    `forward` is the same in training and in use.
    """

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Labels y (B,), int64, in [0, num_classes], to (B, hidden_size)."""
        out: Tensor = self.embedding_table(y)
        return out


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis: x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, arXiv:1910.07467).

    The epsilon is under the root, as in Llama's code and in ONNX' RMSNormalization. In half precision the mean and the root are computed in
    float32, and the product with the weight in the dtype of `x`; T5, Llama, Mistral and Jamba do so too.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) to the same shape and dtype."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normal.to(x.dtype)


class SwiGLU(nn.Module):
    """The gated feed-forward layer FFN_SwiGLU(x) = (silu(x W) * x V) W2 without biases (Shazeer, arXiv:2002.05202, equation 6).

    W, V and W2 are `gate_proj`, `up_proj` and `down_proj`, as in transformers' Llama; `w1`, `w3` and `w2` in Meta's and Mistral's code.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) to (…, dim)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive normalisation's affine part: x (B, N, D), shift and scale (B, D), to (B, N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sincos_2d(dim: int, height: int, width: int) -> Tensor:
    """The fixed two-dimensional sine-cosine position table of MAE's code (He et al., arXiv:2111.06377), which DiT uses.

    The first half of the channels encodes the column and the second half the row; each half is sines, then cosines, of the position
    times 10000^(-i / (dim / 4)). Computed in float64.

    Args:
        dim: Channels, a multiple of 4.
        height: Rows of the grid.
        width: Columns of the grid.

    Returns:
        (height * width, dim), float32, row-major. Always on the CPU: a model built on the meta device keeps a real table.
    """
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)

    def encode(positions: Tensor) -> Tensor:
        angles = positions[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows = torch.arange(height, dtype=torch.float64, device="cpu").repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64, device="cpu").repeat(height)
    return torch.cat([encode(columns), encode(rows)], dim=1).float()


def rotary_table(frequencies: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * frequency, for rotary positions (Su et al., arXiv:2104.09864), computed in float64.

    Args:
        frequencies: (F,), float64, on the CPU.
        positions: How many, from 0.

    Returns:
        Two tables (positions, F), float32, on the CPU: a model built on the meta device keeps real ones.
    """
    angles = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each to one token: (B, C, H, W) to (B, H W / patch_size^2, hidden_size)."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """The tokens, row by row."""
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


def class_conditional_inputs(
    *, channels: int, size: int, classes: int
) -> Callable[[np.random.Generator, Mapping[str, int]], dict[str, Tensor]]:
    """Example inputs of a class-conditional denoiser on square latents, as a ModelSpec's `inputs`.

    Args:
        channels: Channels of the latents.
        size: Their height and width.
        classes: Number of classes; class number `classes` is the null class of classifier-free guidance, and is drawn too.

    Returns:
        A function of a generator and the named sizes (`batch`) that gives `x` (B, C, H, W) standard normal float32, `t` (B,) float32
        in [0, 1000) and `y` (B,) int64.
    """

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = sizes["batch"]
        return {
            "x": torch.from_numpy(rng.standard_normal((batch, channels, size, size), dtype="float32")),
            "t": torch.from_numpy(rng.uniform(0, 1000, batch).astype("float32")),
            "y": torch.from_numpy(rng.integers(0, classes, batch, endpoint=True)),
        }

    return inputs


def tokens_reversed(arrays: Arrays) -> Arrays:
    """Inputs or outputs (B, L, …) with the tokens in reversed order, for the analysis `coherence`."""
    return {name: array[:, ::-1].copy() for name, array in arrays.items()}
