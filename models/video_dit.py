"""A diffusion transformer on spatio-temporal patches of video: Wan 2.1 (Wan team, arXiv:2503.20314).

The best known "world simulator" is Sora, of which no architecture was published beyond this (Brooks et al., "Video generation models as
world simulators", OpenAI 2024): a diffusion transformer over patches of a compressed video's space and time, conditioned by text, for any
duration, resolution and aspect ratio. Wan 2.1 is such a network whose code and weights are public:

    x <- patches of the latents (B, C, F, H, W), 1 x 2 x 2 each, row by row and frame by frame
    x <- x + g1 * SelfAttention((1 + s1) LN(x) + b1)       all patches of all frames see each other; q and k are normalised by RMS over
    x <- x + CrossAttention(LN(x), text)                      all heads, and turned by rotary positions in time, height and width
    x <- x + g2 * FFN((1 + s2) LN(x) + b2)

where b1, s1, g1, b2, s2, g2 are one projection of the time for all blocks plus a table of the block's own. The d / 2 channel pairs of a
head have rotary angles of time, height and width: the last two have floor(d / 6) pairs each.

No weight depends on the number of frames, on height or on width. All three may vary, up to `max_positions` patches each; an artifact takes
up to twice the settings' frames, and up to the larger of their sides along both, unless `--dynamic` gives other ranges.

Checked against diffusers' WanTransformer3DModel; parameters have the names of the authors' code (Wan-Video/Wan2.1, wan/modules/model.py).
The models that take a picture beside the text (I2V) are not here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model
from .layers import rotary_table, timestep_embedding


@dataclass(frozen=True)
class VideoDiTConfig:
    """Settings of a Wan 2.1 text-to-video transformer.

    Attributes:
        in_channels: Channels of the latents, in and out.
        patch_frames: Frames of a patch.
        patch_size: Height and width of a patch.
        hidden_size: Channels of a token; a multiple of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads; a head's channels are even.
        ffn_dim: Channels inside the feed-forward layer.
        text_dim: Channels of the text encoder's output.
        freq_dim: Channels of the sinusoids of the time.
        max_positions: Patches along time, height or width, at most.
        sample_frames: Frames of the latents that an artifact is tuned for; 21 are 81 of the video. Others may be given.
        sample_height: Their height; 60 x 104 is 480 x 832 of the video.
        sample_width: Their width.
        eps: Epsilon of all norms.
    """

    in_channels: int = 16
    patch_frames: int = 1
    patch_size: int = 2
    hidden_size: int = 1536
    depth: int = 30
    num_heads: int = 12
    ffn_dim: int = 8960
    text_dim: int = 4096
    freq_dim: int = 256
    max_positions: int = 1024
    sample_frames: int = 21
    sample_height: int = 60
    sample_width: int = 104
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("in_channels", "patch_frames", "patch_size", "hidden_size", "depth", "num_heads", "ffn_dim", "text_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2 or self.hidden_size // self.num_heads < 6:
            raise ValueError(
                f"hidden_size must be an even multiple of num_heads, 6 or more, got {self.hidden_size} and {self.num_heads} heads"
            )
        if self.freq_dim < 2 or self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even and at least 2, got {self.freq_dim}")
        if self.max_positions < 16:
            raise ValueError(f"max_positions must be at least 16, got {self.max_positions}")
        for name, patch, least in (("frames", self.patch_frames, 1), ("height", self.patch_size, 2), ("width", self.patch_size, 2)):
            size = getattr(self, f"sample_{name}")
            if not least * patch <= size <= self.max_positions * patch or size % patch:
                raise ValueError(f"sample_{name} must be a multiple of {patch}, {least} to {self.max_positions} patches, got {size}")


class RMSNorm(nn.Module):
    """Root-mean-square norm over all channels of a token, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) to the same."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head attention whose queries and keys are normalised over all heads together."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def forward(self, x: Tensor, context: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens x (B, N, D) reading context (B, M, D), with the cosines and sines (N, d / 2) of positions, to (B, N, D)."""
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(context))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, self.v(context)))
        if rotation is not None:
            q, k = rotate_pairs(q, *rotation), rotate_pairs(k, *rotation)
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs (2 i, 2 i + 1) of x (…, N, d) by angles whose cosines and sines, (N, d / 2), are given."""
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Block(nn.Module):
    """Self-attention, attention to the text, and a feed-forward layer."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm1 = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(dim, config.eps)  # the authors' number; it is the second
        self.cross_attn = Attention(config)
        self.norm2 = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Tokens x (B, N, D), the projected time (B, 6, D) and text (B, M, D) to (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6, dim=1)  # each (B, 1, D)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.self_attn(h, h, rotation)
        x = x + self.cross_attn(self.norm3(x), text)
        out: Tensor = x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)
        return out


class Head(nn.Module):
    """Modulated layer norm, then each token to the numbers of its patch."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(dim, config.patch_frames * config.patch_size**2 * config.in_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Tokens x (B, N, D) and the time (B, D) to (B, N, patch_frames patch_size^2 in_channels)."""
        shift, scale = (self.modulation + time.unsqueeze(1)).chunk(2, dim=1)
        out: Tensor = self.head(self.norm(x) * (1 + scale) + shift)
        return out


class VideoDiT(nn.Module):
    """The whole model: noisy latents of a video, times and text to the predicted velocity."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, p = config.hidden_size, config.patch_size
        patch = (config.patch_frames, p, p)
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, patch, stride=patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)
        # The pairs of time, height and width, each with frequencies 10000^(-i / pairs) of its own.
        pairs = dim // config.num_heads // 2
        spatial = dim // config.num_heads // 6
        self.shares = (pairs - 2 * spatial, spatial, spatial)
        frequencies = [10000.0 ** (-torch.arange(n, dtype=torch.float64, device="cpu") / n) for n in self.shares]
        cos, sin = rotary_table(torch.cat(frequencies), config.max_positions)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Predicts the velocity.

        Args:
            x: Noisy latents (B, in_channels, frames, height, width), float32; sizes are multiples of the patch's, of `max_positions`
                patches at most.
            t: Times (B,), float32, in [0, 1000].
            context: The text encoder's output (B, M, text_dim), float32.

        Returns:
            As `x`.
        """
        batch, channels, frames, height, width = x.shape
        pt, p = self.config.patch_frames, self.config.patch_size
        places = frames // pt
        # A convolution of every frame's patches: where a patch is several frames deep, these are channels of one.
        pictures = (
            x.reshape(batch, channels, places, pt, height, width)
            .permute(0, 2, 1, 3, 4, 5)
            .reshape(batch * places, channels * pt, height, width)
        )
        weight = self.patch_embedding.weight.flatten(1, 2)
        patches = F.conv2d(pictures, weight, self.patch_embedding.bias, stride=p)  # (B places, D, rows, columns)
        rows, columns = patches.shape[2:]
        # By way of (B, places, N, D): coreai-core 1.0.0b3 leaves out a reshape of three axes to three whose first two are dynamic in both.
        tokens = patches.reshape(batch, places, -1, rows * columns).transpose(2, 3).flatten(1, 2)

        frequencies = timestep_embedding(t, self.config.freq_dim)
        time = self.time_embedding(frequencies.to(weight.dtype))
        projected = self.time_projection(time).unflatten(1, (6, -1))
        text = self.text_embedding(context)
        rotation = self._angles(self.cos, places, rows, columns), self._angles(self.sin, places, rows, columns)
        for block in self.blocks:
            tokens = block(tokens, projected, text, rotation)
        out = self.head(tokens, time).reshape(batch, places, rows * columns, pt, p * p, channels)
        # (B, places, pt, C, p p, N), of whose pictures a pixel shuffle makes (B frames, C, H, W).
        pixels = out.permute(0, 1, 3, 5, 4, 2).reshape(batch * places * pt, channels * p * p, rows, columns)
        video: Tensor = F.pixel_shuffle(pixels, p).reshape(batch, places * pt, channels, rows * p, columns * p).transpose(1, 2)
        return video

    def _angles(self, table: Tensor, places: int, rows: int, columns: int) -> Tensor:
        """The table's entries of every patch, (N, d / 2)."""
        time, vertical, horizontal = torch.split(table, list(self.shares), dim=1)
        before, beside, behind = self.shares
        first, second, third = (torch.arange(size, device=table.device) for size in (places, rows, columns))
        # Each axis' entries with zeros for the others', added: coremltools 9 neither expands nor slices to sizes that are quotients.
        parts = (
            F.pad(time, (0, beside + behind))[first][:, None, None],
            F.pad(vertical, (before, behind))[second][:, None],
            F.pad(horizontal, (before + beside, 0))[third],
        )
        return (parts[0] + parts[1] + parts[2]).flatten(0, 2)


_DIFFUSERS = (
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"(blocks\.\d+)\.attn1", r"\1.self_attn"),
    (r"(blocks\.\d+)\.attn2", r"\1.cross_attn"),
    (r"(blocks\.\d+\.\w+)\.to_([qkv])", r"\1.\2"),
    (r"(blocks\.\d+\.\w+)\.to_out\.0", r"\1.o"),
    (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
    (r"(blocks\.\d+)\.ffn\.net\.2", r"\1.ffn.2"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"scale_shift_table", "head.modulation"),
    (r"proj_out", "head.head"),
)


def _from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for key, value in state.items():
        name = key
        for theirs, ours in _DIFFUSERS:
            name = re.sub(rf"^{theirs}(?=\.|$)", ours, name)
        converted[name] = value
    return converted


def _diffusers_layout(config: VideoDiTConfig) -> StateDictLayout:
    return StateDictLayout(
        "diffusers",
        lambda keys: "condition_embedder.time_proj.weight" in keys,
        _from_diffusers,
        config={
            "patch_size": [config.patch_frames, config.patch_size, config.patch_size],
            "num_attention_heads": config.num_heads,
            "attention_head_dim": config.hidden_size // config.num_heads,
            "in_channels": config.in_channels,
            "out_channels": config.in_channels,
            "text_dim": config.text_dim,
            "freq_dim": config.freq_dim,
            "ffn_dim": config.ffn_dim,
            "num_layers": config.depth,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": config.eps,
        },
    )


@register_model(
    "video-dit-tiny",
    VideoDiTConfig(
        in_channels=4,
        hidden_size=48,
        depth=2,
        num_heads=2,
        ffn_dim=96,
        text_dim=24,
        freq_dim=32,
        max_positions=64,
        sample_frames=4,
        sample_height=8,
        sample_width=12,
    ),
    summary="Video DiT with 2 blocks of width 48, for trying",
)
@register_model("video-dit-wan-1.3b", VideoDiTConfig(), summary="Wan 2.1 T2V 1.3B, 1.4 G parameters, text to video")
@register_model(
    "video-dit-wan-14b",
    VideoDiTConfig(hidden_size=5120, depth=40, num_heads=40, ffn_dim=13824, sample_height=90, sample_width=160),
    summary="Wan 2.1 T2V 14B, 14 G parameters, text to video",
)
def video_dit(config: VideoDiTConfig) -> ModelSpec:
    """A video DiT; weights may come in the authors' layout or in diffusers'."""
    pt, p = config.patch_frames, config.patch_size

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = sizes["batch"]
        latents = (batch, config.in_channels, sizes["frames"], sizes["height"], sizes["width"])
        context = (batch, sizes["text"], config.text_dim)
        return {
            "x": torch.from_numpy(rng.standard_normal(latents, dtype=np.float32)),
            "t": torch.from_numpy(rng.uniform(0, 1000, batch).astype(np.float32)),
            "context": torch.from_numpy(rng.standard_normal(context, dtype=np.float32)),
        }

    # Nothing in the graph asks for multiples of patch_size: a row or column that fills no patch is left out of the output. Of frames a
    # reshape asks it, which a range cannot say.
    frames = {2: "frames"} if pt == 1 else {}
    fixed = {} if pt == 1 else {"x": {2: f"frames have to stay a multiple of patch_frames, {pt}"}}
    longest = min(2 * config.sample_frames, config.max_positions * pt)
    side = max(config.sample_height, config.sample_width)  # videos may lie or stand
    return ModelSpec(
        build=lambda: VideoDiT(config).eval(),
        inputs=inputs,
        # A few patches: attention over those of the settings takes minutes on a CPU.
        sizes={"batch": 2, "frames": min(3 * pt, longest), "height": min(4 * p, side), "width": min(6 * p, side), "text": 5},
        dynamic={"x": {0: "batch", **frames, 3: "height", 4: "width"}, "t": {0: "batch"}, "context": {0: "batch", 1: "text"}},
        ranges={
            "batch": SizeRange(1, 2, 4),
            "frames": SizeRange(pt, config.sample_frames, longest),
            # One row or one column alone would be a graph of its own: torch.export takes it for a constant.
            "height": SizeRange(2 * p, config.sample_height, side),
            "width": SizeRange(2 * p, config.sample_width, side),
            "text": SizeRange(1, 5, 512),
        },
        fixed=fixed,
        outputs=("velocity",),
        source="Wan team, Wan: Open and Advanced Large-Scale Video Generative Models, arXiv:2503.20314; Brooks et al., Video generation "
        "models as world simulators, OpenAI 2024; checked against diffusers",
        layouts=(_diffusers_layout(config),),
    )
