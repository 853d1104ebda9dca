"""MMDiT: the transformer of Stable Diffusion 3, in which picture and text attend jointly (Esser et al., arXiv:2403.03206).

Each stream has weights of its own; one softmax runs over the tokens of both. The last block gives no text, so its text half has nothing
behind the attention. With `qk_norm` and `dual_layers` it is MMDiT-X, the transformer of Stable Diffusion 3.5 Medium: in these layers the
picture has a second attention of its own. Trained as a rectified flow: the output is the velocity, and `t` the time scaled to [0, 1000].

Names and order of computation are those of the authors' code (Stability-AI/sd3.5, mmditx.py); checked against diffusers'
SD3Transformer2DModel. `pos_embed`, a sine-cosine table of `pos_table` x `pos_table` patches whose middle is used, is a tensor of published
checkpoints and comes from there; a new model computes diffusers' table, whose positions are scaled by (sample_size / patch_size) /
pos_table.
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
from ..exporter.weights import fuse
from .dit import MLP
from .layers import RMSNorm, TimestepEmbedder, modulate

_PREFIX = "model.diffusion_model."
_OTHERS = ("first_stage_model.", "text_encoders.")
"""What else is in a published checkpoint of the whole pipeline: the autoencoder and the text encoders."""


@dataclass(frozen=True)
class MMDiTConfig:
    """Settings of an MMDiT.

    Attributes:
        sample_size: Height and width of the latents that the model was trained for; others may be given.
        patch_size: Height and width of a patch, which becomes one token.
        in_channels: Channels of the latents and of the output.
        hidden_size: Channels of a token; a multiple of 4 and of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads in a block.
        context_channels: Channels of a text token.
        context_length: The longest text, in tokens.
        pooled_channels: Channels of the pooled text.
        pos_table: Height and width of the table of positions, in patches.
        qk_norm: True when queries and keys are normalised by their root mean square.
        dual_layers: How many of the first blocks have a second attention for the picture alone.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    hidden_size: int = 1536
    depth: int = 24
    num_heads: int = 24
    context_channels: int = 4096
    context_length: int = 333
    pooled_channels: int = 2048
    pos_table: int = 192
    qk_norm: bool = False
    dual_layers: int = 0

    def __post_init__(self) -> None:
        sizes = (self.sample_size, self.patch_size, self.in_channels, self.hidden_size, self.depth, self.num_heads, self.pos_table)
        if min(*sizes, self.context_channels, self.context_length, self.pooled_channels) < 1:
            raise ValueError("every size of an MMDiT must be at least 1")
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size must be a multiple of patch_size, got {self.sample_size} and {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of num_heads and of 4, got {self.hidden_size} and {self.num_heads} heads")
        if self.sample_size > self.pos_table * self.patch_size:
            raise ValueError(f"pos_table must hold the {self.sample_size // self.patch_size} patches of a side, got {self.pos_table}")
        if not 0 <= self.dual_layers < self.depth:
            raise ValueError(f"dual_layers must be in [0, {self.depth - 1}], got {self.dual_layers}")


def position_table(dim: int, side: int, base: int) -> Tensor:
    """Sines and cosines of column and row, as `layers.sincos_2d`, for positions i * base / side.

    Args:
        dim: Channels, a multiple of 4.
        side: Rows and columns.
        base: The side that positions are scaled to.

    Returns:
        (1, side * side, dim), float32, row-major, on torch's default device.
    """
    quarter = dim // 4
    positions = torch.arange(side, dtype=torch.float64) * base / side
    angles = positions[:, None] * 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    one = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (side, dim / 2)
    columns, rows = one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, dim)


class QKV(nn.Module):
    """Queries, keys and values of one stream, and the projection of what attention makes of them."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, project: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.ln_q = RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.ln_k = RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim) if project else nn.Identity()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) to queries, keys and values, each (B, heads, N, D / heads)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.ln_q(q), self.ln_k(k), v

    def attend(self, x: Tensor) -> Tensor:
        """Attention within one stream: (B, N, D) to (B, N, D)."""
        out: Tensor = self.proj(F.scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2))
        return out


class StreamBlock(nn.Module):
    """One stream's half of a block: what is done to its tokens before and after the joint attention.

    Attributes:
        pre_only: True for the text of the last block, which ends at the attention.
        dual: True when a second attention of the stream's own runs beside the joint one.
    """

    def __init__(self, config: MMDiTConfig, *, pre_only: bool = False, dual: bool = False) -> None:
        super().__init__()
        dim = config.hidden_size
        self.pre_only, self.dual = pre_only, dual
        self.chunks = 2 if pre_only else 9 if dual else 6
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = QKV(dim, config.num_heads, qk_norm=config.qk_norm, project=not pre_only)
        if dual:
            self.attn2 = QKV(dim, config.num_heads, qk_norm=config.qk_norm)
        if not pre_only:
            self.mlp = MLP(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, self.chunks * dim))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """Condition c (B, D) to shift and scale (of `pre_only`), and gate, shift, scale, gate, and with `dual` shift, scale, gate again."""
        chunks: tuple[Tensor, ...] = self.adaLN_modulation(c).chunk(self.chunks, dim=1)
        return chunks

    def after(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Tokens x (B, N, D) and what attention gave for them (B, N, D) to the block's tokens (B, N, D)."""
        gate1, shift2, scale2, gate2 = modulation[2:6]
        out = x + gate1.unsqueeze(1) * self.attn.proj(attended)
        if self.dual:
            shift3, scale3, gate3 = modulation[6:]
            out = out + gate3.unsqueeze(1) * self.attn2.attend(modulate(self.norm(x), shift3, scale3))
        result: Tensor = out + gate2.unsqueeze(1) * self.mlp(modulate(self.norm(out), shift2, scale2))
        return result


class JointBlock(nn.Module):
    """A block: both streams, and the attention over the tokens of both."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.context_block = StreamBlock(config, pre_only=index == config.depth - 1)
        self.x_block = StreamBlock(config, dual=index < config.dual_layers)

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Text (B, L, D), picture (B, N, D) and condition (B, D) to both again; the text of the last block is what it was."""
        of_context, of_x = self.context_block.modulation(c), self.x_block.modulation(c)
        of_both = (
            self.context_block.attn.split(modulate(self.context_block.norm(context), *of_context[:2])),
            self.x_block.attn.split(modulate(self.x_block.norm(x), *of_x[:2])),
        )
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*of_both, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L + N, D)
        length = context.shape[1]
        if not self.context_block.pre_only:
            context = self.context_block.after(context, attended[:, :length], of_context)
        return context, self.x_block.after(x, attended[:, length:], of_x)


class VectorEmbedder(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_channels, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, y: Tensor) -> Tensor:
        """(B, in_channels) to (B, dim)."""
        out: Tensor = self.mlp(y)
        return out


class Patches(nn.Module):
    """Patches of the latents to tokens on their grid: (B, C, H, W) to (B, h, w, D)."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """The tokens."""
        out: Tensor = self.proj(x).permute(0, 2, 3, 1)
        return out


class FinalLayer(nn.Module):
    """Modulated layer norm, then each token to the pixels of its patch."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) and condition c (B, D) to (B, N, patch_size^2 in_channels)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class MMDiT(nn.Module):
    """The whole model: noisy latents, time and text to the velocity."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = Patches(config)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = VectorEmbedder(config.pooled_channels, config.hidden_size)
        self.context_embedder = nn.Linear(config.context_channels, config.hidden_size)
        base = config.sample_size // config.patch_size
        self.register_buffer("pos_embed", position_table(config.hidden_size, config.pos_table, base))
        self.joint_blocks = nn.ModuleList(JointBlock(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Predicts the velocity at `x`.

        Args:
            x: (B, in_channels, H, W), float32; H and W multiples of `patch_size`, at most `pos_table` patches.
            t: (B,), float32, in [0, 1000].
            context: (B, L, context_channels), float32.
            pooled: (B, pooled_channels), float32.

        Returns:
            (B, in_channels, H, W), float32.
        """
        c = self.t_embedder(t) + self.y_embedder(pooled)  # (B, D)
        context = self.context_embedder(context)
        grid = self.x_embedder(x)  # (B, h, w, D)
        height, width = grid.shape[1:3]
        tokens = (grid + self._positions(height, width)).flatten(1, 2)
        for block in self.joint_blocks:
            context, tokens = block(context, tokens, c)
        return self._unpatchify(self.final_layer(tokens, c), height, width)

    def _positions(self, height: int, width: int) -> Tensor:
        """The middle of the table, (height, width, D)."""
        side = self.config.pos_table
        rows, columns = (torch.arange(size, device=self.pos_embed.device) + (side - size) // 2 for size in (height, width))
        return self.pos_embed.view(side, side, -1)[rows][:, columns]

    def _unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        p, channels = self.config.patch_size, self.config.in_channels
        # (B, N, p p C), with the channels innermost, to (B, C p p, h, w), of which a pixel shuffle makes (B, C, h p, w p).
        pixels = tokens.reshape(tokens.shape[0], height * width, p * p, channels).permute(0, 3, 2, 1)
        return F.pixel_shuffle(pixels.reshape(tokens.shape[0], channels * p * p, height, width), p)


_DIFFUSERS_NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DIFFUSERS_BLOCK_NAMES = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_DIFFUSERS_QKV = {
    "attn.to_{}": "x_block.attn.qkv",
    "attn.add_{}_proj": "context_block.attn.qkv",
    "attn2.to_{}": "x_block.attn2.qkv",
}


def _from_diffusers(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    fused = {parts.format(x): (parts, ours) for parts, ours in _DIFFUSERS_QKV.items() for x in "qkv"}
    # These two have scale and shift the other way round there.
    swapped = ("final_layer.adaLN_modulation.1.", f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1.")
    converted: dict[str, Tensor] = {}
    for key in state:
        name, _, kind = key.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
        if key == "pos_embed.pos_embed":
            target = "pos_embed"
        elif block is None:
            target = f"{_DIFFUSERS_NAMES.get(name, name)}.{kind}"
        elif block[2] in fused:
            parts, ours = fused[block[2]]
            names = [f"transformer_blocks.{block[1]}.{parts.format(x)}.{kind}" for x in "qkv"]
            fuse(state, names, converted, f"joint_blocks.{block[1]}.{ours}.{kind}")
            continue
        else:
            target = f"joint_blocks.{block[1]}.{_DIFFUSERS_BLOCK_NAMES[block[2]]}.{kind}" if block[2] in _DIFFUSERS_BLOCK_NAMES else key
        value = state[key]
        converted[target] = torch.cat(value.chunk(2)[::-1]) if target.startswith(swapped) else value
    return converted


def _layouts(config: MMDiTConfig) -> tuple[StateDictLayout, ...]:
    def from_pipeline(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix(_PREFIX): state[key] for key in state if not key.startswith(_OTHERS)}

    return (
        StateDictLayout(
            "diffusers",
            lambda keys: "pos_embed.pos_embed" in keys,
            lambda state: _from_diffusers(state, config.depth),
            config={
                "sample_size": config.sample_size,
                "patch_size": config.patch_size,
                "in_channels": config.in_channels,
                "out_channels": config.in_channels,
                "num_layers": config.depth,
                "num_attention_heads": config.num_heads,
                "attention_head_dim": config.hidden_size // config.num_heads,
                "joint_attention_dim": config.context_channels,
                "caption_projection_dim": config.hidden_size,
                "pooled_projection_dim": config.pooled_channels,
                "pos_embed_max_size": config.pos_table,
                "qk_norm": "rms_norm" if config.qk_norm else None,
            },
        ),
        StateDictLayout("Stability-AI/sd3.5", lambda keys: any(key.startswith(_PREFIX) for key in keys), from_pipeline),
    )


@register_model(
    "mmdit-tiny",
    MMDiTConfig(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        depth=2,
        num_heads=2,
        context_channels=24,
        context_length=12,
        pooled_channels=20,
        pos_table=12,
    ),
    summary="MMDiT with 2 blocks of width 32, for trying",
)
@register_model(
    "mmdit-sd3-medium",
    MMDiTConfig(),
    summary="The transformer of Stable Diffusion 3 Medium, 2 B parameters: 128x128 latents, texts of up to 333 tokens",
)
@register_model(
    "mmdit-sd3.5-medium",
    MMDiTConfig(pos_table=384, qk_norm=True, dual_layers=13),
    summary="The transformer of Stable Diffusion 3.5 Medium (MMDiT-X), 2.2 B parameters: 128x128 latents, texts of up to 333 tokens",
)
def mmdit(config: MMDiTConfig) -> ModelSpec:
    """An MMDiT; weights may come in diffusers' layout or as Stability AI's checkpoint."""
    size, patch = config.sample_size, config.patch_size

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = sizes["batch"]
        arrays = {
            "x": rng.standard_normal((batch, config.in_channels, sizes["height"], sizes["width"])),
            "t": rng.uniform(0, 1000, batch),
            "context": rng.standard_normal((batch, sizes["length"], config.context_channels)),
            "pooled": rng.standard_normal((batch, config.pooled_channels)),
        }
        return {name: torch.from_numpy(array.astype("float32")) for name, array in arrays.items()}

    # Nothing in the graph asks for multiples of patch_size: a row or column that fills no patch is left out of the output.
    spatial = SizeRange(max(1, size // 2 // patch) * patch, size, min(2 * size, config.pos_table * patch))
    return ModelSpec(
        build=lambda: MMDiT(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "height": size, "width": size, "length": min(154, config.context_length)},
        dynamic={
            "x": {0: "batch", 2: "height", 3: "width"},
            "t": {0: "batch"},
            "context": {0: "batch", 1: "length"},
            "pooled": {0: "batch"},
        },
        ranges={
            "batch": SizeRange(1, 2, 8),
            "height": spatial,
            "width": spatial,
            "length": SizeRange(1, min(154, config.context_length), config.context_length),
        },
        outputs=("velocity",),
        source="Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv:2403.03206; "
        "checked against diffusers",
        layouts=_layouts(config),
    )
