"""MambaVision: a hierarchical classifier of convolutions, then Mamba mixers and attention (Hatamizadeh and Kautz, arXiv:2407.08083).

The picture is reduced by 4 and by 2 after each of the first three stages. Stages 1 and 2 are residual convolutions. Stages 3 and 4 cut
their maps into windows, whose pixels are tokens in raster order, and mix them by layers of which the first half (rounded up) have the
MambaVision mixer and the rest attention, each followed by an MLP. The mixer is Mamba-1's without causality in the convolution and with a
branch beside the scan in place of the gate:

    x', z = in_proj(x)                                            (L, D / 2) each
    u = silu(conv_x(x')), v = silu(conv_z(z))                     depthwise, width 3, centred
    y = scan(u), selected from u                                  state 8
    out = out_proj([y, v])

Checked against the authors' package mambavision 1.2.0 (NVIDIA), whose parameter names are kept. Two things are the code's and not the
paper's: the bias of `dt_proj` is added twice, once by the layer and once by the scan, which the released weights are trained with; and the
convolutions have no bias.

The size of the picture is fixed: windows are counted, and maps padded up to them, while the model is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.ops.selective_scan.eager import selective_scan
from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model
from .dit import Attention

STAGES = 4


@dataclass(frozen=True)
class MambaVisionConfig:
    """Settings of a MambaVision.

    Attributes:
        image_size: Height and width of the picture, a multiple of 32.
        in_channels: Channels of the picture.
        num_classes: Number of classes.
        stem_size: Channels between the two convolutions of the stem.
        hidden_size: Channels of the first stage; each stage has twice as many as the one before.
        depths: Layers of each of the four stages.
        num_heads: Attention heads of each stage; those of the first two, which have no attention, are not used.
        windows: Height and width of the windows of each stage; likewise.
        mlp_ratio: Width inside the MLPs, relative to the stage's.
        layer_scale: Whether the branches of stages 3 and 4 are multiplied by learned factors, as in the larger models.
        state_size: State of the scan per channel.
        conv_size: Width of the mixers' convolutions, odd.
    """

    image_size: int = 224
    in_channels: int = 3
    num_classes: int = 1000
    stem_size: int = 32
    hidden_size: int = 80
    depths: tuple[int, ...] = (1, 3, 8, 4)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    windows: tuple[int, ...] = (8, 8, 14, 7)
    mlp_ratio: int = 4
    layer_scale: bool = False
    state_size: int = 8
    conv_size: int = 3

    def __post_init__(self) -> None:
        for name in ("image_size", "in_channels", "num_classes", "stem_size", "hidden_size", "mlp_ratio", "state_size", "conv_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("depths", "num_heads", "windows"):
            given = getattr(self, name)
            if len(given) != STAGES or min(given) < 1:
                raise ValueError(f"{name} must be {STAGES} numbers of at least 1, got {given}")
        if self.image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32, got {self.image_size}")
        if self.conv_size % 2 == 0:
            raise ValueError(f"conv_size must be odd, got {self.conv_size}")
        for stage in (2, 3):
            if self.width(stage) % self.num_heads[stage]:
                raise ValueError(f"num_heads must divide the width of stage {stage + 1}, {self.width(stage)}, got {self.num_heads[stage]}")

    def width(self, stage: int) -> int:
        """Channels of a stage, counted from 0."""
        return self.hidden_size << stage


class Stem(nn.Module):
    """Two strided convolutions: (B, in_channels, H, W) to (B, hidden_size, H / 4, W / 4)."""

    def __init__(self, config: MambaVisionConfig) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(config.in_channels, config.stem_size, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(config.stem_size, eps=1e-4),
            nn.ReLU(),
            nn.Conv2d(config.stem_size, config.hidden_size, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(config.hidden_size, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.conv_down(x)
        return out


class ConvBlock(nn.Module):
    """Two convolutions on the residual stream, (B, C, H, W) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = x + self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)), approximate="tanh")))
        return out


class MambaVisionMixer(nn.Module):
    """The mixer of the module's text, (B, L, D) to the same."""

    def __init__(self, width: int, state_size: int, conv_size: int) -> None:
        super().__init__()
        half, rank = width // 2, math.ceil(width / 16)
        self.splits = (rank, state_size, state_size)
        self.in_proj = nn.Linear(width, width, bias=False)
        self.x_proj = nn.Linear(half, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(rank, half)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state_size + 1, dtype=torch.float32)).repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(width, width, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, conv_size, groups=half, padding=conv_size // 2, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, conv_size, groups=half, padding=conv_size // 2, bias=False)
        # Mamba's initialisation: step sizes spread log-uniformly over 1e-3 to 1e-1, through the inverse of softplus.
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        delta = torch.exp(torch.rand(half) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        with torch.no_grad():
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        stream, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        u = F.silu(self.conv1d_x(stream)).transpose(1, 2)
        v = F.silu(self.conv1d_z(z)).transpose(1, 2)
        dt, B, C = torch.split(self.x_proj(u), list(self.splits), dim=-1)
        # The layer adds its bias, and so does the scan: see the module's text.
        y = selective_scan(u, self.dt_proj(dt), -torch.exp(self.A_log), B, C, self.D, None, self.dt_proj.bias, delta_softplus=True)[0]
        out: Tensor = self.out_proj(torch.cat([y, v], dim=-1))
        return out


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) to the same."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A mixer and an MLP on the residual stream of a window's tokens, (B, L, D) to the same."""

    def __init__(self, config: MambaVisionConfig, stage: int, *, attention: bool) -> None:
        super().__init__()
        width = config.width(stage)
        self.norm1 = nn.LayerNorm(width)
        self.mixer: nn.Module
        if attention:
            self.mixer = Attention(width, config.num_heads[stage])
        else:
            self.mixer = MambaVisionMixer(width, config.state_size, config.conv_size)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, config.mlp_ratio * width)
        # Training starts at 1e-5, which would hide these branches from a check of random weights.
        self.gamma_1 = nn.Parameter(torch.ones(width)) if config.layer_scale else None
        self.gamma_2 = nn.Parameter(torch.ones(width)) if config.layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        mixed = self.mixer(self.norm1(x))
        x = x + (mixed if self.gamma_1 is None else self.gamma_1 * mixed)
        spread = self.mlp(self.norm2(x))
        out: Tensor = x + (spread if self.gamma_2 is None else self.gamma_2 * spread)
        return out


class Downsample(nn.Module):
    """A strided convolution: (B, C, H, W) to (B, 2 C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.reduction(x)
        return out


class Stage(nn.Module):
    """The layers of a stage, and what leads to the next."""

    def __init__(self, config: MambaVisionConfig, stage: int) -> None:
        super().__init__()
        depth, width = config.depths[stage], config.width(stage)
        self.side = config.image_size // 4 // 2**stage
        self.window = config.windows[stage]
        self.by_convolution = stage < 2
        if self.by_convolution:
            self.blocks = nn.ModuleList(ConvBlock(width) for _ in range(depth))
        else:
            first = depth // 2 + depth % 2
            self.blocks = nn.ModuleList(Block(config, stage, attention=i >= first) for i in range(depth))
        self.downsample = Downsample(width) if stage < STAGES - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, side, side) to the next stage's, or to the same."""
        if self.by_convolution:
            for block in self.blocks:
                x = block(x)
        else:
            missing = -self.side % self.window
            if missing:
                x = F.pad(x, (0, missing, 0, missing))
            tokens = self._cut(x)
            for block in self.blocks:
                tokens = block(tokens)
            x = self._join(tokens)
            if missing:
                x = x[:, :, : self.side, : self.side]
        return x if self.downsample is None else self.downsample(x)

    # Rows of windows, then windows: no tensor has more than five axes, which is what Core ML takes.

    def _cut(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (windows, tokens, C), windows of a picture beside each other."""
        channels, side, window = x.shape[1], x.shape[3], self.window
        if side != window:
            x = x.reshape(x.shape[0], channels, -1, window, side).transpose(1, 2).flatten(0, 1)  # (B rows, C, window, W)
            x = x.reshape(x.shape[0], channels, window, -1, window).permute(0, 3, 1, 2, 4).reshape(-1, channels, window, window)
        return x.flatten(2).transpose(1, 2)

    def _join(self, tokens: Tensor) -> Tensor:
        """The inverse of `_cut`."""
        window, columns = self.window, -(-self.side // self.window)
        channels = tokens.shape[2]
        x = tokens.transpose(1, 2).reshape(-1, channels, window, window)  # one for each window
        if columns > 1:
            x = x.reshape(-1, columns, channels, window, window).permute(0, 2, 3, 1, 4).flatten(3)  # (B rows, C, window, W)
            x = x.reshape(-1, columns, channels, window, columns * window).transpose(1, 2)
            x = x.reshape(-1, channels, columns * window, columns * window)
        return x


class MambaVision(nn.Module):
    """The whole network."""

    def __init__(self, config: MambaVisionConfig) -> None:
        super().__init__()
        width = config.width(STAGES - 1)
        self.patch_embed = Stem(config)
        self.levels = nn.ModuleList(Stage(config, stage) for stage in range(STAGES))
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies pictures (B, in_channels, image_size, image_size), float32: logits (B, num_classes)."""
        x = self.patch_embed(x)
        for level in self.levels:
            x = level(x)
        out: Tensor = self.head(self.norm(x).mean((2, 3)))
        return out


def _layout() -> StateDictLayout:
    """The checkpoints on the model hub: the authors' names under `model.`."""
    return StateDictLayout(
        "nvidia/MambaVision",
        lambda keys: "model.patch_embed.conv_down.0.weight" in keys,
        lambda state: {key.removeprefix("model."): value for key, value in state.items()},
    )


@register_model(
    "mambavision-tiny",
    MambaVisionConfig(
        image_size=64,
        num_classes=10,
        stem_size=8,
        hidden_size=12,
        depths=(1, 1, 2, 2),
        num_heads=(1, 1, 2, 4),
        windows=(8, 8, 4, 2),
        mlp_ratio=2,
        state_size=4,
    ),
    summary="MambaVision with 6 layers of width 12 to 96, for trying",
)
@register_model("mambavision-t", MambaVisionConfig(), summary="MambaVision-T, 31.8 M parameters, 224x224 pictures")
@register_model("mambavision-t2", MambaVisionConfig(depths=(1, 3, 11, 4)), summary="MambaVision-T2, 35.1 M parameters, 224x224 pictures")
@register_model(
    "mambavision-s",
    MambaVisionConfig(stem_size=64, hidden_size=96, depths=(3, 3, 7, 5)),
    summary="MambaVision-S, 50.1 M parameters, 224x224 pictures",
)
@register_model(
    "mambavision-b",
    MambaVisionConfig(stem_size=64, hidden_size=128, depths=(3, 3, 10, 5), layer_scale=True),
    summary="MambaVision-B, 97.7 M parameters, 224x224 pictures",
)
@register_model(
    "mambavision-l",
    MambaVisionConfig(stem_size=64, hidden_size=196, depths=(3, 3, 10, 5), num_heads=(4, 8, 16, 32), layer_scale=True),
    summary="MambaVision-L, 227.9 M parameters, 224x224 pictures",
)
@register_model(
    "mambavision-l2",
    MambaVisionConfig(stem_size=64, hidden_size=196, depths=(3, 3, 12, 5), num_heads=(4, 8, 16, 32), layer_scale=True),
    summary="MambaVision-L2, 241.5 M parameters, 224x224 pictures",
)
def mambavision(config: MambaVisionConfig) -> ModelSpec:
    """A MambaVision."""
    size = config.image_size
    fixed = f"windows are counted for pictures of {size}x{size}; --set image_size=N counts them for another size"

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(rng.standard_normal((sizes["batch"], config.in_channels, size, size), dtype=np.float32))}

    return ModelSpec(
        build=lambda: MambaVision(config).eval(),
        inputs=inputs,
        sizes={"batch": 2},
        dynamic={"x": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 64)},
        fixed={"x": {2: fixed, 3: fixed}},
        outputs=("logits",),
        source="Hatamizadeh & Kautz, MambaVision: A Hybrid Mamba-Transformer Vision Backbone, arXiv:2407.08083; checked with mambavision",
        layouts=(_layout(),),
    )
