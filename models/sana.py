"""SANA's linear diffusion transformer: linear attention, cross-attention to a caption, convolutional MLP (Xie et al., arXiv:2410.10629).

Checked against diffusers' SanaTransformer2DModel and read beside the authors' code (NVlabs/Sana, diffusion/model/nets). Where they differ:

- The epsilon of the linear attention is 1e-15 in the authors' class and in diffusers; the authors' blocks pass 1e-8. Here it is 1e-15.
- The authors round timesteps down to integers; diffusers and this file do not.
- The authors switch float32 attention on by a setting; diffusers and this file always compute it so.
- The authors drop padded caption tokens before the attention where xformers is installed; elsewhere, as in diffusers and here, they add
  -10000 to the padded tokens' scores.

The 0.6B and 1.6B models have no position embedding (the depthwise convolutions see the positions); the 2K and 4K models add sines and
cosines of the positions to the tokens (`position_scale`). Height, width and caption length are free in both. SANA-1.5 and SANA-Sprint,
which normalise queries and keys and embed the guidance, are other architectures, and are refused by name.

Weights come in diffusers' layout, or in the authors', which is published as a `.pth` of `{"state_dict": tensors}`: save the tensors as
safetensors. Of the authors' tensors, `y_embedder.y_embedding` (the caption of nothing, which is an input here) and `logvar_linear` (for
training) are left out, and so is `pos_embed`, a buffer that the authors' class always has: zeros without a position embedding, else its
values, which are compared with the model's own. Nothing else tells a 2K or 4K file from one of the 1.6B model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, register_model
from .flow import digits_sampler
from .layers import PatchEmbed, TimestepEmbedder, modulate
from .sana_layouts import authors_layout, diffusers_layout

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class SanaConfig:
    """Settings of a SANA transformer.

    Attributes:
        sample_size: Height and width of the input that the model was trained for; others may be given.
        patch_size: Height and width of a patch, which becomes one token.
        in_channels: Channels of the input and of the output.
        hidden_size: Channels of a token; a multiple of `head_dim` and of `num_cross_heads`.
        depth: Number of blocks.
        head_dim: Channels of a head of the linear attention.
        num_cross_heads: Heads of the cross-attention.
        mlp_ratio: Channels inside the Mix-FFN, after its gate, relative to `hidden_size`.
        caption_channels: Channels of a caption token.
        caption_length: The longest caption, in tokens.
        caption_mask: True when the model takes a mask of the caption's tokens as a fourth input.
        position_scale: By what positions are divided before their sines and cosines are added to the tokens; 0 adds none.
    """

    sample_size: int = 16
    patch_size: int = 1
    in_channels: int = 32
    hidden_size: int = 1152
    depth: int = 28
    head_dim: int = 32
    num_cross_heads: int = 16
    mlp_ratio: float = 2.5
    caption_channels: int = 2304
    caption_length: int = 300
    caption_mask: bool = True
    position_scale: float = 0.0

    def __post_init__(self) -> None:
        sizes = (self.sample_size, self.patch_size, self.in_channels, self.hidden_size, self.depth, self.head_dim, self.num_cross_heads)
        if min(*sizes, self.caption_channels, self.caption_length) < 1:
            raise ValueError("every size of a SANA transformer must be at least 1")
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size must be a multiple of patch_size, got {self.sample_size} and {self.patch_size}")
        if not 0 <= self.position_scale < math.inf:
            raise ValueError(f"position_scale must be at least 0 and finite, got {self.position_scale}")
        if self.position_scale and self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4 for sines and cosines of two positions, got {self.hidden_size}")
        if self.hidden_size % self.head_dim or self.hidden_size % self.num_cross_heads:
            raise ValueError(
                f"hidden_size must be a multiple of head_dim and of num_cross_heads, "
                f"got {self.hidden_size}, {self.head_dim} and {self.num_cross_heads}"
            )


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-15) -> Tensor:
    """Attention with the kernel relu(q) . relu(k), in time linear in the number of tokens (section 2.2 of the paper).

    For each head and query n::

        out_n = (sum_m v_m (relu(k_m) . relu(q_n))) / (sum_m relu(k_m) . relu(q_n) + eps)

    A further channel of v, constant 1, carries the denominator through the same two products. The epsilon is what makes a query without a
    positive channel give 0 and not 0 / 0; it needs float32.

    Args:
        q: (B, heads, d, N), float32.
        k: Like q.
        v: Like q.
        eps: See above.

    Returns:
        (B, heads, d, N), float32.
    """
    q, k = F.relu(q), F.relu(k)
    v = F.pad(v, (0, 0, 0, 1), value=1.0)
    out = (v @ k.transpose(-1, -2)) @ q  # (B, heads, d + 1, N)
    return out[:, :, :-1] / (out[:, :, -1:] + eps)


class LinearAttention(nn.Module):
    """Self-attention with the kernel relu(q) . relu(k); its products and the division are computed in float32."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = dim // head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        q, k, v = (
            self.qkv(x).float().unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 4, 1).unbind(0)
        )  # each (B, heads, D / heads, N)
        out = relu_linear_attention(q, k, v)
        projected: Tensor = self.proj(out.flatten(1, 2).transpose(1, 2).to(x.dtype))
        return projected


class CrossAttention(nn.Module):
    """Multi-head softmax attention from the picture's tokens to the caption's."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, caption: Tensor, bias: Tensor | None) -> Tensor:
        """Tokens x (B, N, D), caption (B, L, D) and bias (B, 1, 1, L), which is added to the scores, to (B, N, D)."""
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, D / heads)
        k, v = self.kv_linear(caption).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
        return out


class MixFFN(nn.Module):
    """Inverted residual convolution with a gate: 1x1, SiLU, depthwise 3x3, gated linear unit, 1x1 (GLUMBConv in the published code)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.inverted_conv = nn.Conv2d(dim, 2 * hidden_dim, 1)
        self.depth_conv = nn.Conv2d(2 * hidden_dim, 2 * hidden_dim, 3, padding=1, groups=2 * hidden_dim)
        self.point_conv = nn.Conv2d(hidden_dim, dim, 1, bias=False)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, height * width, D) to the same shape."""
        x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)
        x, gate = self.depth_conv(F.silu(self.inverted_conv(x))).chunk(2, dim=1)
        out: Tensor = self.point_conv(x * F.silu(gate)).flatten(2).transpose(1, 2)
        return out


class SanaBlock(nn.Module):
    """Linear attention, cross-attention and Mix-FFN.

    adaLN-single (PixArt-alpha, arXiv:2310.00426): the modulation that all blocks share, plus a table of the block's own.
    """

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = LinearAttention(dim, config.head_dim)
        self.cross_attn = CrossAttention(dim, config.num_cross_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MixFFN(dim, int(dim * config.mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, x: Tensor, caption: Tensor, bias: Tensor | None, modulation: Tensor, height: int, width: int) -> Tensor:
        """Tokens x (B, N, D) with N = height * width, caption (B, L, D) and modulation (B, 6, D) to (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).unbind(1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross_attn(x, caption, bias)
        out: Tensor = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2), height, width)
        return out


class FinalLayer(nn.Module):
    """Modulated layer norm, then each token to the pixels of its patch."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, config.patch_size**2 * config.in_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Tokens x (B, N, D) and embedded timestep t (B, D) to (B, N, patch_size^2 in_channels)."""
        shift, scale = (self.scale_shift_table + t.unsqueeze(1)).unbind(1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class PositionEmbedding(nn.Module):
    """Sines and cosines of column and row, as `layers.sincos_2d`, for positions i * base / side / scale, for any height and width.

    So the positions of a picture of any size span the same interval [0, base / scale), base being the number of patches along a side at
    `sample_size`.
    """

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        self.quarter = config.hidden_size // 4
        self.span = config.sample_size // config.patch_size / config.position_scale

    def forward(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """(height * width, D), float32, whatever the module's own type is."""
        steps = torch.arange(self.quarter, dtype=torch.float32, device=device)
        frequencies = torch.exp(steps * (-math.log(10000.0) / self.quarter))

        def encode(side: int) -> Tensor:
            angles = (torch.arange(side, dtype=torch.float32, device=device) * self.span / side).unsqueeze(1) * frequencies
            return torch.cat([angles.sin(), angles.cos()], dim=-1)

        columns, rows = encode(width).expand(height, width, -1), encode(height).unsqueeze(1).expand(height, width, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class Sana(nn.Module):
    """The whole model: noisy latents, timesteps and caption tokens to the predicted velocity."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.config = config
        self.x_embedder = PatchEmbed(config.in_channels, config.hidden_size, config.patch_size)
        self.positions = PositionEmbedding(config) if config.position_scale else None
        self.t_embedder = TimestepEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = nn.Sequential(nn.Linear(config.caption_channels, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.attention_y_norm = nn.RMSNorm(dim, eps=1e-5)
        self.blocks = nn.ModuleList(SanaBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))  # as a linear layer
        for layer in (*self.t_embedder.mlp, *self.t_block, *self.y_embedder):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, caption: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predicts the velocity at `x`.

        Args:
            x: (B, in_channels, H, W), float32; H and W multiples of `patch_size`.
            t: (B,), float32, in [0, 1000].
            caption: (B, L, caption_channels), float32; the last hidden states of a text encoder.
            mask: (B, L), int64, as tokenizers give it: 1 for a token, 0 for padding. None when every token counts.

        Returns:
            (B, in_channels, H, W), float32.
        """
        p = self.config.patch_size
        height, width = x.shape[2] // p, x.shape[3] // p
        condition = self.t_embedder(t)  # (B, D)
        modulation = self.t_block(condition).unflatten(1, (6, -1))  # (B, 6, D)
        caption = self.attention_y_norm(self.y_embedder(caption))  # (B, L, D)
        bias = None if mask is None else ((1 - mask.to(x.dtype)) * -10000.0)[:, None, None, :]
        tokens = self.x_embedder(x)  # (B, N, D)
        if self.positions is not None:
            tokens = tokens + self.positions(height, width, x.device).to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, caption, bias, modulation, height, width)
        pixels: Tensor = self.final_layer(tokens, condition).reshape(x.shape[0], height, width, p, p, self.config.in_channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.config.in_channels, height * p, width * p)


@register_model(
    "sana-tiny",
    SanaConfig(
        sample_size=8, in_channels=4, hidden_size=32, depth=2, head_dim=16, num_cross_heads=2, caption_channels=24, caption_length=12
    ),
    summary="SANA with 2 blocks of width 32, for trying",
)
@register_model(
    "sana-600m",
    SanaConfig(hidden_size=1152, depth=28, num_cross_heads=16),
    summary="SANA 0.6B for 512 px: 16x16 latents of 32 channels, captions of up to 300 tokens",
)
@register_model(
    "sana-1.6b",
    SanaConfig(hidden_size=2240, depth=20, num_cross_heads=20),
    summary="SANA 1.6B for 512 px: 16x16 latents of 32 channels, captions of up to 300 tokens",
)
@register_model(
    "sana-1.6b-2k",
    SanaConfig(sample_size=64, hidden_size=2240, depth=20, num_cross_heads=20, position_scale=1.0),
    summary="SANA 1.6B for 2048 px, with a position embedding: 64x64 latents of 32 channels, captions of up to 300 tokens",
)
@register_model(
    "sana-1.6b-4k",
    SanaConfig(sample_size=128, hidden_size=2240, depth=20, num_cross_heads=20, position_scale=2.0),
    summary="SANA 1.6B for 4096 px, with a position embedding: 128x128 latents of 32 channels, captions of up to 300 tokens",
)
def sana(config: SanaConfig) -> ModelSpec:
    """A SANA transformer; weights may come in diffusers' layout or in the authors'."""
    axes: dict[str, dict[int, str]] = {"x": {0: "batch"}, "t": {0: "batch"}, "caption": {0: "batch", 1: "length"}}
    if config.caption_mask:
        axes["mask"] = {0: "batch", 1: "length"}
    ranges = {"batch": SizeRange(1, 2, 8), "length": SizeRange(1, config.caption_length, config.caption_length)}
    if config.patch_size == 1:  # a size that must stay a multiple of something has no range
        axes["x"] |= {2: "height", 3: "width"}
        size = config.sample_size
        ranges |= {name: SizeRange(max(1, size // 2), size, 4 * size) for name in ("height", "width")}
    multiple = f"a size has to stay a multiple of patch_size, {config.patch_size}, which a range cannot say"

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch, length = sizes["batch"], sizes["length"]
        height, width = sizes.get("height", config.sample_size), sizes.get("width", config.sample_size)
        x = rng.standard_normal((batch, config.in_channels, height, width), dtype="float32")
        t = rng.uniform(0, 1000, batch).astype("float32")
        caption = rng.standard_normal((batch, length, config.caption_channels), dtype="float32")
        arrays: dict[str, NDArray[Any]] = {"x": x, "t": t, "caption": caption}
        if config.caption_mask:
            tokens = rng.integers(1, length, batch, endpoint=True)
            arrays["mask"] = (np.arange(length) < tokens[:, None]).astype("int64")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    side = config.sample_size // config.patch_size
    # The longest caption costs as much as the picture itself at these sizes, so the example's is shorter.
    sizes = {"batch": 2, "length": min(64, config.caption_length)}
    return ModelSpec(
        build=lambda: Sana(config).eval(),
        inputs=inputs,
        sizes=sizes | {name: config.sample_size for name in ("height", "width") if name in ranges},
        dynamic=axes,
        ranges=ranges,
        fixed={} if config.patch_size == 1 else {"x": {2: multiple, 3: multiple}},
        outputs=("sample",),
        source="Xie et al., SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, arXiv:2410.10629; "
        "checked against diffusers",
        layouts=(diffusers_layout(config), authors_layout(config, lambda: PositionEmbedding(config)(side, side))),
    )


DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "")
"""The captions of `sana-digits` by label; label 10, the empty caption, is the condition "no caption"."""

_ALPHABET = "abcdefghijklmnopqrstuvwxyz "


def spell(labels: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
    """The digits' English names as one-hot characters, padded with blanks on the right: the captions of `sana-digits`.

    Args:
        labels: (B,), in [0, 10]; 10 gives blanks only.

    Returns:
        (B, 5, 27), float32: for each of five characters, one of a to z or, last, the blank.
    """
    characters = [[_ALPHABET.index(c) for c in DIGIT_NAMES[int(label)].ljust(5)] for label in labels]
    return np.eye(len(_ALPHABET), dtype=np.float32)[np.array(characters, dtype=np.int64).reshape(-1, 5)]


@register_model(
    "sana-digits",
    SanaConfig(
        sample_size=8,
        in_channels=1,
        hidden_size=64,
        depth=4,
        head_dim=16,
        num_cross_heads=4,
        caption_channels=27,
        caption_length=5,
        caption_mask=False,
    ),
    summary="SANA for 8x8 digits by spelled name, 0.3 M parameters, rectified flow",
)
def sana_digits(config: SanaConfig) -> ModelSpec:
    """A SANA transformer trained on scikit-learn's digits."""
    spec = sana(config)

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        drawn = spec.inputs(rng, sizes)
        # Captions are words: on random numbers in their place the model computes values that it never sees.
        words = spell(rng.integers(0, len(DIGIT_NAMES), sizes["batch"]))
        return {**drawn, "caption": torch.from_numpy(words[:, : sizes["length"]].copy())}

    return dataclasses.replace(
        spec,
        inputs=inputs,
        ranges={**spec.ranges, "batch": SizeRange(1, 40, 64)},
        weights=Path(__file__).parent / "weights" / "sana-digits.safetensors",
        sampler=digits_sampler(lambda labels: {"caption": spell(labels)}),
    )
