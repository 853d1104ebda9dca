"""Consistency models: from any point of a trajectory to its origin, in one step (Song et al., arXiv:2303.01469).

    f(x, sigma) = c_skip(sigma) x + c_out(sigma) F(x / sqrt(sigma^2 + d^2), 250 ln sigma)
    c_skip = d^2 / ((sigma - e)^2 + d^2),   c_out = d (sigma - e) / sqrt(sigma^2 + d^2)

with d = 0.5 the data's standard deviation and e = 0.002 the smallest noise, at which f is the identity (the boundary condition of appendix
C). F is the U-Net of ADM (Dhariwal & Nichol, arXiv:2105.05233): residual blocks whose second norm is scaled and shifted by time and class,
resampling inside such blocks, and attention at the lower resolutions.

Two forms with the same weights: one call of f, and the sampling loop of algorithm 1, some calls with noise in between, which for one
step is the paper's one-step generator. The survey's sketch gives the network t = 1 for pure noise; the paper's noise is sigma = 80.

Checked against diffusers' UNet2DModel and CMStochasticIterativeScheduler, in the configuration of the released models
(openai/diffusers-cd_imagenet64_l2), whose parameter names are kept. The pipeline there clamps f to [-1, 1]; f itself is given here.
Weights with the names of the authors' code (openai/consistency_models, cm/unet.py) are understood too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model
from .layers import timestep_embedding
from .sdxl_unet import Embedding

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5


@dataclass(frozen=True)
class ConsistencyConfig:
    """Settings of a consistency model.

    Attributes:
        sample_size: Height and width of a picture.
        in_channels: Its channels.
        widths: Channels at each resolution; multiples of `norm_groups`, and of `head_dim` where there is attention.
        layers: Residual blocks at each resolution on the way down; there is one more on the way up.
        attention: Whether there is attention, by resolution.
        head_dim: Channels of an attention head.
        norm_groups: Groups of the group norms.
        num_classes: Number of classes.
        sigmas: Noise of each step of the sampling loop, falling; empty for one call of f.
    """

    sample_size: int = 64
    in_channels: int = 3
    widths: tuple[int, ...] = (192, 384, 576, 768)
    layers: int = 3
    attention: tuple[bool, ...] = (False, True, True, True)
    head_dim: int = 64
    norm_groups: int = 32
    num_classes: int = 1000
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_unet(self)
        if any(not SIGMA_MIN < sigma <= SIGMA_MAX for sigma in self.sigmas) or list(self.sigmas) != sorted(set(self.sigmas), reverse=True):
            raise ValueError(f"sigmas must fall, from {SIGMA_MAX} at the most to more than {SIGMA_MIN}, got {self.sigmas}")


class UNetConfig(Protocol):
    """What `UNet` reads of a configuration: the attributes of `ConsistencyConfig` of these names."""

    @property
    def sample_size(self) -> int: ...  # noqa: D102 - see ConsistencyConfig, as for the others

    @property
    def in_channels(self) -> int: ...  # noqa: D102 - as above

    @property
    def widths(self) -> tuple[int, ...]: ...  # noqa: D102 - as above

    @property
    def layers(self) -> int: ...  # noqa: D102 - as above

    @property
    def attention(self) -> tuple[bool, ...]: ...  # noqa: D102 - as above

    @property
    def head_dim(self) -> int: ...  # noqa: D102 - as above

    @property
    def norm_groups(self) -> int: ...  # noqa: D102 - as above

    @property
    def num_classes(self) -> int: ...  # noqa: D102 - as above


def check_unet(config: UNetConfig) -> None:
    """Raises ValueError for settings of a U-Net that contradict each other."""
    sizes = (config.sample_size, config.in_channels, *config.widths, config.layers, config.head_dim, config.norm_groups, config.num_classes)
    if not config.widths or min(sizes) < 1:
        raise ValueError("every size of the U-Net must be at least 1")
    if len(config.widths) != len(config.attention):
        raise ValueError(f"attention must have an entry for each of {config.widths}, got {config.attention}")
    if config.widths[0] % 2 or any(width % config.norm_groups for width in config.widths):
        raise ValueError(f"widths must be even multiples of norm_groups, got {config.widths} and {config.norm_groups}")
    attended = [width for width, has in zip(config.widths, config.attention, strict=True) if has]
    if any(width % config.head_dim for width in (*attended, config.widths[-1])):
        raise ValueError(f"widths with attention, and the last, must be multiples of head_dim, got {config.widths} and {config.head_dim}")
    if config.sample_size % 2 ** (len(config.widths) - 1):
        raise ValueError(f"sample_size must be a multiple of {2 ** (len(config.widths) - 1)}, got {config.sample_size}")


class ResnetBlock(nn.Module):
    """Two convolutions beside the identity (or a 1x1 convolution), whose second norm is scaled and shifted by the condition.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        config: The U-Net's settings.
        resample: 2.0 doubles height and width before the first convolution and beside it, 0.5 halves them.
        further: True when there is a second condition, with a projection of its own.
    """

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, resample: float = 1.0, *, further: bool = False) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.widths[0], 2 * out_channels)
        self.further_emb_proj = nn.Linear(4 * config.widths[0], 2 * out_channels) if further else None
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == 1:
            return x
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample > 1 else F.avg_pool2d(x, 2)

    def forward(self, x: Tensor, c: Sequence[Tensor]) -> Tensor:
        """(B, in_channels, H, W) and one or two conditions, after their SiLU, (B, 4 widths[0]), to (B, out_channels, r H, r W)."""
        h = self.conv1(self._resampled(F.silu(self.norm1(x))))
        projected = self.time_emb_proj(c[0])
        if self.further_emb_proj is not None:
            projected = projected + self.further_emb_proj(c[1])
        scale, shift = projected[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        out: Tensor = self.conv_shortcut(self._resampled(x)) + h
        return out


class Attention(nn.Module):
    """Multi-head softmax attention among the positions of a feature map, beside the identity."""

    def __init__(self, dim: int, config: UNetConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group_norm = nn.GroupNorm(config.norm_groups, dim, eps=1e-5)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + mixed.transpose(1, 2).reshape(x.shape)
        return out


class Level(nn.Module):
    """The blocks of one resolution on one side."""

    def __init__(self, inputs: Sequence[int], width: int, config: UNetConfig, *, attention: bool, further: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, width, config, further=further) for channels in inputs)
        self.attentions = nn.ModuleList(Attention(width, config) for _ in inputs if attention)

    def step(self, i: int, x: Tensor, c: Sequence[Tensor]) -> Tensor:
        """The residual block `i`, and the attention behind it."""
        out: Tensor = self.resnets[i](x, c)
        return self.attentions[i](out) if i < len(self.attentions) else out


class DownLevel(Level):
    """A level on the way down."""

    def __init__(self, index: int, config: UNetConfig, *, further: bool) -> None:
        first, width = config.widths[max(index - 1, 0)], config.widths[index]
        super().__init__([first, *[width] * (config.layers - 1)], width, config, attention=config.attention[index], further=further)
        last = index + 1 == len(config.widths)
        self.downsamplers = nn.ModuleList([] if last else [ResnetBlock(width, width, config, 0.5, further=further)])

    def forward(self, x: Tensor, c: Sequence[Tensor]) -> list[Tensor]:
        """A map and the conditions to the maps that the way up takes, the last of which goes on down."""
        maps = []
        for i in range(len(self.resnets)):
            x = self.step(i, x, c)
            maps.append(x)
        return [*maps, *(down(x, c) for down in self.downsamplers)]


class MidLevel(Level):
    """The middle: a residual block on either side of an attention."""

    def __init__(self, config: UNetConfig, *, further: bool) -> None:
        width = config.widths[-1]
        super().__init__([width, width], width, config, attention=False, further=further)
        self.attentions = nn.ModuleList([Attention(width, config)])

    def forward(self, x: Tensor, c: Sequence[Tensor]) -> Tensor:
        """(B, C, H, W) to the same."""
        out: Tensor = self.resnets[1](self.step(0, x, c), c)
        return out


class UpLevel(Level):
    """A level on the way up: each residual block reads a map of the way down beside the one from before."""

    def __init__(self, index: int, config: UNetConfig, *, further: bool) -> None:
        widths, last = config.widths, len(config.widths) - 1
        below, width, skip = widths[min(index + 1, last)], widths[index], widths[max(index - 1, 0)]
        # The maps of the way down: one for each residual block, and what this level was given there.
        inputs = [(below if i == 0 else width) + (skip if i == config.layers else width) for i in range(config.layers + 1)]
        super().__init__(inputs, width, config, attention=config.attention[index], further=further)
        self.upsamplers = nn.ModuleList([ResnetBlock(width, width, config, 2.0, further=further)] if index else [])

    def forward(self, x: Tensor, maps: list[Tensor], c: Sequence[Tensor]) -> Tensor:
        """A map and those of the way down, the last of which are taken off the list."""
        for i in range(len(self.resnets)):
            x = self.step(i, torch.cat([x, maps.pop()], dim=1), c)
        for up in self.upsamplers:
            x = up(x, c)
        return x


class UNet(nn.Module):
    """ADM's U-Net.

    `further` adds a second time: its embedding `further_embedding`, and a projection of that, `further_emb_proj`, in each residual block,
    which is added to the projection of time and class.
    """

    def __init__(self, config: UNetConfig, *, further: bool = False) -> None:
        super().__init__()
        widths, levels, dim = config.widths, range(len(config.widths)), 4 * config.widths[0]
        self.frequencies = widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], dim)
        if further:
            self.further_embedding = Embedding(widths[0], dim)
        self.class_embedding = nn.Embedding(config.num_classes, dim)
        self.down_blocks = nn.ModuleList(DownLevel(i, config, further=further) for i in levels)
        self.mid_block = MidLevel(config, further=further)
        self.up_blocks = nn.ModuleList(UpLevel(i, config, further=further) for i in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, further: Tensor | None = None) -> Tensor:
        """Maps x (B, C, H, W) to the same shape.

        Args:
            x: Scaled noisy pictures.
            t: What the sinusoids are of (B,), float32.
            y: Classes (B,), int64.
            further: A second time (B,), float32, of a network that was built for one.
        """
        c = [F.silu(self.time_embedding(timestep_embedding(t, self.frequencies)) + self.class_embedding(y))]
        if further is not None:
            c.append(F.silu(self.further_embedding(timestep_embedding(further, self.frequencies))))
        x = self.conv_in(x)
        maps = [x]
        for down in self.down_blocks:
            maps += down(maps[-1], c)
        x = self.mid_block(maps[-1], c)
        for up in self.up_blocks:
            x = up(x, maps, c)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class ConsistencyModel(nn.Module):
    """One call of f."""

    def __init__(self, config: ConsistencyConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config)

    def origin(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """f(x, sigma) for the classes y."""
        s = sigma[:, None, None, None]
        root = torch.sqrt(s * s + SIGMA_DATA**2)
        skip = SIGMA_DATA**2 / ((s - SIGMA_MIN) ** 2 + SIGMA_DATA**2)
        out: Tensor = skip * x + SIGMA_DATA * (s - SIGMA_MIN) / root * self.unet(x / root, 250 * torch.log(sigma), y)
        return out

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """The origin of each trajectory.

        Args:
            x: Noisy pictures (B, in_channels, sample_size, sample_size), float32.
            sigma: Their noise (B,), float32 in [0.002, 80].
            y: Classes (B,), int64.

        Returns:
            As `x`.
        """
        return self.origin(x, sigma, y)


class ConsistencySampler(ConsistencyModel):
    """The sampling loop (algorithm 1 of the paper)."""

    def forward(self, noise: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # the other form
        """Draws pictures.

        Args:
            noise: Standard normal (B, steps, in_channels, sample_size, sample_size), float32.
            y: Classes (B,), int64.

        Returns:
            Pictures (B, in_channels, sample_size, sample_size).
        """
        sigmas = self.config.sigmas
        x = self.origin(noise[:, 0] * sigmas[0], torch.full_like(noise[:, 0, 0, 0, 0], sigmas[0]), y)
        for step, sigma in enumerate(sigmas[1:], 1):
            x = x + noise[:, step] * (sigma**2 - SIGMA_MIN**2) ** 0.5
            x = self.origin(x, torch.full_like(noise[:, 0, 0, 0, 0], sigma), y)
        return x


def diffusers_layout(config: UNetConfig) -> StateDictLayout:
    """A UNet2DModel, as diffusers' consistency pipelines keep it."""

    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"unet.{key}": value for key, value in state.items()}

    return StateDictLayout(
        "diffusers",
        lambda keys: {"conv_in.weight", "class_embedding.weight"} <= keys,
        convert,
        config={
            "sample_size": config.sample_size,
            "in_channels": config.in_channels,
            "out_channels": config.in_channels,
            "block_out_channels": list(config.widths),
            "layers_per_block": config.layers,
            "attention_head_dim": config.head_dim,
            "norm_num_groups": config.norm_groups,
            "attn_norm_num_groups": config.norm_groups,
            "num_class_embeds": config.num_classes,
            "resnet_time_scale_shift": "scale_shift",
            "down_block_types": ["AttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in config.attention],
            "up_block_types": ["AttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in reversed(config.attention)],
        },
    )


_AUTHORS_NAMES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed_s.0": "further_embedding.linear_1",
    "time_embed_s.2": "further_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_AUTHORS_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "emb_layers_s.1": "further_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
}


def authors_layout(config: UNetConfig, name: str) -> StateDictLayout:
    """A UNetModel of ADM's code, as OpenAI's consistency models and Sony's trajectory models keep it, with the name given.

    The blocks of either side are numbered through there, resampling ones included, and queries, keys and values are one convolution.
    """
    layers = config.layers

    def place(side: str | None, number: int, part: int, attention: bool) -> str:
        if side is None:
            return "mid_block.attentions.0" if attention else f"mid_block.resnets.{part // 2}"
        level, i = divmod(number - (side == "input"), layers + 1)
        block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
        if attention:
            return f"{block}.attentions.{i}"
        # On the way down a block of its own halves; on the way up the last one's second or third part doubles.
        if side == "input":
            return f"{block}.downsamplers.0" if i == layers else f"{block}.resnets.{i}"
        return f"{block}.upsamplers.0" if part else f"{block}.resnets.{i}"

    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = {}
        for key, value in state.items():
            full, _, kind = key.rpartition(".")
            found = re.fullmatch(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d+)\.(.+)", full)
            if full in _AUTHORS_NAMES or found is None:
                converted[f"unet.{_AUTHORS_NAMES.get(full, full)}.{kind}"] = value
                continue
            rest = found[4]
            target = "unet." + place(found[1], int(found[2] or 0), int(found[3]), rest in ("norm", "qkv", "proj_out"))
            if rest in ("qkv", "proj_out") and kind == "weight":
                value = value.flatten(1)  # noqa: PLW2901 - a convolution of 1x1 is a linear layer
            if rest == "qkv":
                for part, one in zip("qkv", value.chunk(3), strict=True):
                    converted[f"{target}.to_{part}.{kind}"] = one
            else:
                converted[f"{target}.{_AUTHORS_PARTS.get(rest, rest)}.{kind}"] = value
        return converted

    return StateDictLayout(name, lambda keys: "input_blocks.0.0.weight" in keys, convert)


@register_model(
    "consistency-tiny",
    ConsistencyConfig(sample_size=8, widths=(16, 32), layers=1, attention=(False, True), head_dim=16, norm_groups=8, num_classes=10),
    summary="Consistency model with two resolutions of 16 and 32 channels, for trying",
)
@register_model(
    "consistency-sampler-tiny",
    ConsistencyConfig(
        sample_size=8, widths=(16,), layers=1, attention=(False,), head_dim=16, norm_groups=8, num_classes=10, sigmas=(80.0, 0.821)
    ),
    summary="Two steps of sampling with a consistency model of 16 channels, for trying",
)
@register_model("consistency-imagenet64", ConsistencyConfig(), summary="Consistency model of ImageNet-64, 296 M parameters")
@register_model(
    "consistency-sampler-imagenet64",
    ConsistencyConfig(sigmas=(80.0,)),
    summary="One-step generator of ImageNet-64, 296 M parameters",
)
def consistency(config: ConsistencyConfig) -> ModelSpec:
    """A consistency model, or its sampling loop; weights may come in diffusers' layout or in the authors'."""
    picture = (config.in_channels, config.sample_size, config.sample_size)

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = sizes["batch"]
        y = torch.from_numpy(rng.integers(0, config.num_classes, batch))
        if config.sigmas:
            return {"noise": torch.from_numpy(rng.standard_normal((batch, len(config.sigmas), *picture), dtype=np.float32)), "y": y}
        sigma = np.exp(rng.uniform(np.log(SIGMA_MIN), np.log(SIGMA_MAX), batch)).astype(np.float32)
        x = rng.standard_normal((batch, *picture), dtype=np.float32) * np.sqrt(sigma**2 + SIGMA_DATA**2)[:, None, None, None]
        return {"x": torch.from_numpy(x.astype(np.float32)), "sigma": torch.from_numpy(sigma), "y": y}

    fixed = f"attention and resampling are laid out for {config.sample_size}x{config.sample_size}; --set sample_size=N for another size"
    name = "noise" if config.sigmas else "x"
    return ModelSpec(
        build=lambda: (ConsistencySampler if config.sigmas else ConsistencyModel)(config).eval(),
        inputs=inputs,
        sizes={"batch": 2},
        dynamic={n: {0: "batch"} for n in ((name, "y") if config.sigmas else (name, "sigma", "y"))},
        ranges={"batch": SizeRange(1, 2, 16)},
        fixed={name: dict.fromkeys((3, 4) if config.sigmas else (2, 3), fixed)},
        outputs=("sample",),
        source="Song et al., Consistency Models, arXiv:2303.01469; Dhariwal & Nichol, arXiv:2105.05233; checked against diffusers",
        layouts=(diffusers_layout(config), authors_layout(config, "openai/consistency_models")),
    )
