"""The U-Net of Stable Diffusion XL (Podell et al., arXiv:2307.01952).

A convolutional U-Net with three resolutions. Transformer blocks stand at the lower two, as many as `attention_depths` says:
self-attention among the positions, cross-attention to the text, and a GEGLU layer (Shazeer, arXiv:2002.05202). The timestep's embedding
is joined by one of the pooled text and of six numbers, the original size, the crop's corner and the target size of the picture
(section 2.2 of the paper).

Names are diffusers', against whose UNet2DConditionModel it is checked; the authors' code (Stability-AI/generative-models,
openaimodel.py) has other names for the same computation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model
from .layers import timestep_embedding

_CONDITIONS = 6
"""Numbers in `time_ids`: original height and width, top and left of the crop, target height and width."""


@dataclass(frozen=True)
class SDXLUNetConfig:
    """Settings of an SDXL U-Net.

    Attributes:
        sample_size: Height and width of the latents that the model was trained for; others may be given.
        in_channels: Channels of the latents and of the output.
        widths: Channels at each resolution; multiples of `norm_groups`, and of `head_dim` where there is attention.
        layers: Residual blocks at each resolution on the way down; there is one more on the way up.
        attention_depths: Transformer blocks behind each residual block, by resolution; the middle has as many as the last.
        head_dim: Channels of an attention head.
        context_channels: Channels of a text token.
        context_length: The longest text, in tokens.
        pooled_channels: Channels of the pooled text.
        condition_channels: Sinusoids for each number in `time_ids`; even.
        norm_groups: Groups of the group norms.
    """

    sample_size: int = 128
    in_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280)
    layers: int = 2
    attention_depths: tuple[int, ...] = (0, 2, 10)
    head_dim: int = 64
    context_channels: int = 2048
    context_length: int = 77
    pooled_channels: int = 1280
    condition_channels: int = 256
    norm_groups: int = 32

    def __post_init__(self) -> None:
        sizes = (self.sample_size, self.in_channels, *self.widths, self.layers, self.head_dim, self.context_channels)
        if not self.widths or min(*sizes, self.context_length, self.pooled_channels, self.condition_channels, self.norm_groups) < 1:
            raise ValueError("every size of an SDXL U-Net must be at least 1")
        if len(self.widths) != len(self.attention_depths) or min(self.attention_depths) < 0:
            raise ValueError(f"attention_depths must have a number, 0 or more, for each of {self.widths}, got {self.attention_depths}")
        if any(width % self.norm_groups for width in self.widths):
            raise ValueError(f"widths must be multiples of norm_groups, got {self.widths} and {self.norm_groups}")
        if any(depth and width % self.head_dim for width, depth in zip(self.widths, self.attention_depths, strict=True)):
            raise ValueError(f"widths with attention must be multiples of head_dim, got {self.widths} and {self.head_dim}")
        if self.widths[0] % 2 or self.condition_channels % 2:
            raise ValueError(f"widths[0] and condition_channels must be even, got {self.widths[0]} and {self.condition_channels}")
        if self.sample_size % self.factor:
            raise ValueError(f"sample_size must be a multiple of {self.factor}, got {self.sample_size}")

    @property
    def factor(self) -> int:
        """The highest resolution, relative to the lowest."""
        return int(2 ** (len(self.widths) - 1))


class Embedding(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels) to (B, dim)."""
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class ResnetBlock(nn.Module):
    """Two convolutions beside the identity (or a 1x1 convolution); the condition is added to each channel between them."""

    def __init__(self, in_channels: int, out_channels: int, config: SDXLUNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.widths[0], out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, in_channels, H, W) and the condition, after its SiLU, (B, 4 widths[0]), to (B, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(c)[:, :, None, None]
        out: Tensor = self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class Attention(nn.Module):
    """Multi-head softmax attention from the picture's positions to themselves or to the text."""

    def __init__(self, dim: int, source_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(source_dim, dim, bias=False)
        self.to_v = nn.Linear(source_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Queries from x (B, N, dim), keys and values from source (B, L, source_dim), to (B, N, dim)."""
        q, k, v = (
            layer(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, tokens in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        out: Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class GEGLU(nn.Module):
    """A linear layer, half of which is gated by the GELU of the other half."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) to (B, N, hidden_dim)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    """GEGLU of four times the width, and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))  # diffusers has a dropout between them

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) to the same shape."""
        out: Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward layer, each behind a layer norm and beside the identity."""

    def __init__(self, dim: int, config: SDXLUNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, config.head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, config.context_channels, config.head_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Positions x (B, N, dim) and text (B, L, context_channels) to (B, N, dim)."""
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class Transformer(nn.Module):
    """Some transformer blocks over the positions of a feature map, between two linear layers, beside the identity."""

    def __init__(self, dim: int, depth: int, config: SDXLUNetConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(dim, config) for _ in range(depth))
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, dim, H, W) and text (B, L, context_channels) to (B, dim, H, W)."""
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        out: Tensor = x + self.proj_out(tokens).transpose(1, 2).reshape(x.shape)
        return out


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2), rounded up."""
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """A 3x3 convolution over doubled pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, C, H / 2, W / 2), rounded up, to (B, C, H, W)."""
        out: Tensor = self.conv(F.interpolate(x, size=(height, width), mode="nearest"))
        return out


class Level(nn.Module):
    """The blocks of one resolution on one side. Which children there are, and their names, is as in diffusers."""

    def __init__(self, inputs: Sequence[int], index: int, config: SDXLUNetConfig) -> None:
        super().__init__()
        width, depth = config.widths[index], config.attention_depths[index]
        self.resnets = nn.ModuleList(ResnetBlock(channels, width, config) for channels in inputs)
        self.attentions = nn.ModuleList(Transformer(width, depth, config) for _ in inputs if depth)

    def step(self, i: int, x: Tensor, c: Tensor, context: Tensor) -> Tensor:
        """The residual block `i`, and the transformer behind it: (B, inputs[i], H, W) to (B, width, H, W)."""
        out: Tensor = self.resnets[i](x, c)
        return self.attentions[i](out, context) if self.attentions else out


class DownLevel(Level):
    """A level on the way down."""

    def __init__(self, index: int, config: SDXLUNetConfig) -> None:
        first, width = config.widths[max(index - 1, 0)], config.widths[index]
        super().__init__([first, *[width] * (config.layers - 1)], index, config)
        self.downsamplers = nn.ModuleList([Downsample(width)] if index + 1 < len(config.widths) else [])

    def forward(self, x: Tensor, c: Tensor, context: Tensor) -> list[Tensor]:
        """A map (B, C, H, W), condition and text to the maps that the way up takes, the last of which goes on down."""
        maps = []
        for i in range(len(self.resnets)):
            x = self.step(i, x, c, context)
            maps.append(x)
        return [*maps, *(down(x) for down in self.downsamplers)]


class MidLevel(Level):
    """The middle: a residual block on either side of a transformer."""

    def __init__(self, config: SDXLUNetConfig) -> None:
        width, depth = config.widths[-1], config.attention_depths[-1]
        super().__init__([width, width], len(config.widths) - 1, config)
        self.attentions = nn.ModuleList([Transformer(width, depth, config)] if depth else [])

    def forward(self, x: Tensor, c: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        out: Tensor = self.resnets[1](self.step(0, x, c, context), c)
        return out


class UpLevel(Level):
    """A level on the way up: each residual block reads a map of the way down beside the one from before."""

    def __init__(self, index: int, config: SDXLUNetConfig) -> None:
        widths, last = config.widths, len(config.widths) - 1
        below, width, skip = widths[min(index + 1, last)], widths[index], widths[max(index - 1, 0)]
        # The maps of the way down: one for each residual block, and what this level was given there.
        inputs = [(below if i == 0 else width) + (skip if i == config.layers else width) for i in range(config.layers + 1)]
        super().__init__(inputs, index, config)
        self.upsamplers = nn.ModuleList([Upsample(width)] if index else [])

    def forward(self, x: Tensor, maps: list[Tensor], c: Tensor, context: Tensor) -> Tensor:
        """A map (B, C, H, W) and those of the way down, the last of which are taken off the list, to (B, width, H, W) or twice that."""
        for i in range(len(self.resnets)):
            x = self.step(i, torch.cat([x, maps.pop()], dim=1), c, context)
        for up in self.upsamplers:
            x = up(x, *maps[-1].shape[2:])
        return x


class SDXLUNet(nn.Module):
    """The whole model: noisy latents, time, text, pooled text and the picture's sizes to the predicted noise."""

    def __init__(self, config: SDXLUNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, levels = config.widths, range(len(config.widths))
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], 4 * widths[0])
        self.add_embedding = Embedding(config.pooled_channels + _CONDITIONS * config.condition_channels, 4 * widths[0])
        self.down_blocks = nn.ModuleList(DownLevel(i, config) for i in levels)
        self.mid_block = MidLevel(config)
        self.up_blocks = nn.ModuleList(UpLevel(i, config) for i in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """Predicts the noise in `x`.

        Args:
            x: (B, in_channels, H, W), float32.
            t: (B,), float32, in [0, 1000].
            context: (B, L, context_channels), float32.
            pooled: (B, pooled_channels), float32.
            time_ids: (B, 6), float32: the original height and width of the picture, top and left of its crop, its height and width.

        Returns:
            (B, in_channels, H, W), float32.
        """
        c = F.silu(self._condition(t, pooled, time_ids))
        x = self.conv_in(x)
        maps = [x]
        for down in self.down_blocks:
            maps += down(maps[-1], c, context)
        x = self.mid_block(maps[-1], c, context)
        for up in self.up_blocks:
            x = up(x, maps, c, context)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out

    def _condition(self, t: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """(B, 4 widths[0])."""
        time = timestep_embedding(t, self.config.widths[0]).to(pooled.dtype)
        sizes = timestep_embedding(time_ids.flatten(), self.config.condition_channels).to(pooled.dtype)  # (B * 6, condition_channels)
        added = torch.cat([pooled, sizes.reshape(pooled.shape[0], -1)], dim=1)
        condition: Tensor = self.time_embedding(time) + self.add_embedding(added)
        return condition


_PREFIX = "model.diffusion_model."
_OTHERS = ("first_stage_model.", "conditioner.", "denoiser.")
"""What else is in a published checkpoint of the whole pipeline: the autoencoder, the text encoders and the noise levels."""

_AUTHORS_NAMES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_AUTHORS_RESNET_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _from_authors(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The blocks of either side are numbered through there; a way down or up is the last of its level."""
    converted: dict[str, Tensor] = {}
    for key in state:
        if key.startswith(_OTHERS):
            continue
        name, _, kind = key.removeprefix(_PREFIX).rpartition(".")
        found = re.fullmatch(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d+)\.(.+)", name)
        if not key.startswith(_PREFIX):
            converted[key] = state[key]
        elif name in _AUTHORS_NAMES or found is None:
            converted[f"{_AUTHORS_NAMES.get(name, name)}.{kind}"] = state[key]
        else:
            side, number, part, rest = found[1], int(found[2] or 0), int(found[3]), found[4]
            level, i = divmod(number - (side == "input"), layers + 1)
            block = {"input": f"down_blocks.{level}", "output": f"up_blocks.{level}", None: "mid_block"}[side]
            if rest in _AUTHORS_RESNET_NAMES:
                target = f"{block}.resnets.{part // 2 if side is None else i}.{_AUTHORS_RESNET_NAMES[rest]}"
            elif rest == "op" or (rest == "conv" and side == "output"):
                target = f"{block}.{'down' if rest == 'op' else 'up'}samplers.0.conv"
            else:
                target = f"{block}.attentions.{0 if side is None else i}.{rest}"
            converted[f"{target}.{kind}"] = state[key]
    return converted


def _layouts(config: SDXLUNetConfig) -> tuple[StateDictLayout, ...]:
    attends = [depth > 0 for depth in config.attention_depths]
    return (
        StateDictLayout(
            "diffusers",  # our names
            lambda keys: "add_embedding.linear_1.weight" in keys,
            dict,
            config={
                "sample_size": config.sample_size,
                "in_channels": config.in_channels,
                "out_channels": config.in_channels,
                "block_out_channels": list(config.widths),
                "layers_per_block": config.layers,
                "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
                "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
                "transformer_layers_per_block": [max(1, depth) for depth in config.attention_depths],
                "attention_head_dim": [width // config.head_dim for width in config.widths],  # the number of heads is called so there
                "cross_attention_dim": config.context_channels,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": config.condition_channels,
                "use_linear_projection": True,
                "norm_num_groups": config.norm_groups,
                "norm_eps": 1e-5,
                "act_fn": "silu",
                "flip_sin_to_cos": True,
                "freq_shift": 0,
            },
        ),
        StateDictLayout(
            "Stability-AI/generative-models",
            lambda keys: any(key.startswith(_PREFIX) for key in keys),
            lambda state: _from_authors(state, config.layers),
        ),
    )


@register_model(
    "sdxl-unet-tiny",
    SDXLUNetConfig(
        sample_size=8,
        widths=(16, 32),
        layers=1,
        attention_depths=(0, 1),
        head_dim=16,
        context_channels=24,
        context_length=12,
        pooled_channels=20,
        condition_channels=16,
        norm_groups=4,
    ),
    summary="SDXL's U-Net with 2 resolutions, for trying",
)
@register_model(
    "sdxl-unet-base",
    SDXLUNetConfig(),
    summary="The U-Net of Stable Diffusion XL base, 2.6 B parameters: 128x128 latents, texts of 77 tokens",
)
def sdxl_unet(config: SDXLUNetConfig) -> ModelSpec:
    """An SDXL U-Net; weights may come in diffusers' layout or as Stability AI's checkpoint."""
    size, longest = config.sample_size, config.context_length

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = sizes["batch"]
        arrays = {
            "x": rng.standard_normal((batch, config.in_channels, sizes["height"], sizes["width"])),
            "t": rng.uniform(0, 1000, batch),
            "context": rng.standard_normal((batch, sizes["length"], config.context_channels)),
            "pooled": rng.standard_normal((batch, config.pooled_channels)),
            "time_ids": rng.integers(0, 1024, (batch, _CONDITIONS), endpoint=True),
        }
        return {name: torch.from_numpy(array.astype("float32")) for name, array in arrays.items()}

    spatial = SizeRange(max(1, size // 2), size, 2 * size)
    return ModelSpec(
        build=lambda: SDXLUNet(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "height": size, "width": size, "length": longest},
        dynamic={
            "x": {0: "batch", 2: "height", 3: "width"},
            "t": {0: "batch"},
            "context": {0: "batch", 1: "length"},
            "pooled": {0: "batch"},
            "time_ids": {0: "batch"},
        },
        # Texts longer than what one pass of the text encoders takes are joined from several.
        ranges={"batch": SizeRange(1, 2, 8), "height": spatial, "width": spatial, "length": SizeRange(1, longest, 4 * longest)},
        outputs=("noise",),
        source="Podell et al., SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, arXiv:2307.01952; "
        "checked against diffusers",
        layouts=_layouts(config),
    )
