"""Vision Mamba (Vim): pictures classified by bidirectional Mamba blocks over patches (Zhu et al., arXiv:2401.09417).

Patches become tokens in raster order; a class token stands in their middle; positions are learned. Each layer is x + mixer(norm(x)) with

    x', z = in_proj(norm(x))
    mixer = out_proj((scan_forwards(x') + scan_backwards(x')) silu(z) / 2)

where each direction has a convolution, a selection and a scan of its own, Mamba-1's. The last class token, normed, is classified.

Checked against the authors' code (hustvl/Vim, vim/models_mamba.py, the models `…_midclstok_div2`) and its layout; the blocks also against
mambapy's VMamba. The authors gate each direction with the same z before the sum, which is the gated sum above.

**Streaming.** The network above cannot stream: what a layer hands on for the first patch depends on the last one through the backward
scan, so the next layer has to wait for the whole picture. The `vim-stream` form is therefore another network, the unidirectional one of
the paper's ablations: forward scans alone, with a class token that is asked after the patches and not written into the states. It takes
any number of patches and the states before them, and says after each piece what the picture shows so far, in memory that does not grow
with the picture. Its weights are its own: those of the bidirectional models were trained for both directions, and none are published. Nor
is a size of picture; `vim-stream-ti-16` and `-s-16` have positions for 1024x1024, 4096 patches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model
from .layers import PatchEmbed, RMSNorm
from .mamba import Mamba1Block, MambaCore, MambaLayer, scale_residual_branches


@dataclass(frozen=True)
class VimConfig:
    """Settings of a Vim.

    Attributes:
        image_size: Height and width of the picture, a multiple of `patch_size`. Fixed, because the positions are.
        patch_size: Height and width of a patch.
        in_channels: Channels of the picture.
        num_classes: Number of classes.
        hidden_size: D, width of the residual stream.
        depth: Number of layers.
        expand: E / D, width inside a mixer over that of the stream.
        state_size: N, state of a scan per channel.
        conv_size: Width of the convolutions, at least 2.
        norm_eps: Epsilon of the norms.
    """

    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    hidden_size: int = 192
    depth: int = 24
    expand: int = 2
    state_size: int = 16
    conv_size: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "in_channels", "num_classes", "hidden_size", "depth", "expand", "state_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}")
        if self.conv_size < 2:
            raise ValueError(f"conv_size must be at least 2, got {self.conv_size}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be above 0, got {self.norm_eps}")

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def inner(self) -> int:
        """E, width inside a mixer."""
        return self.expand * self.hidden_size


class VimMixer(nn.Module):
    """A gated pair of Mamba cores, one in each direction."""

    def __init__(self, width: int, *, state_size: int = 16, conv_size: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner, rank = expand * width, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.forwards = MambaCore(inner, state_size, conv_size, rank)
        self.backwards = MambaCore(inner, state_size, conv_size, rank, reverse=True)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes (B, L, D) along L, each token seeing all."""
        stream, z = self.in_proj(x).chunk(2, dim=-1)
        out: Tensor = self.out_proj((self.forwards(stream) + self.backwards(stream)) * (0.5 * F.silu(z)))
        return out


class VimLayer(nn.Module):
    """A mixer behind a norm, on the residual stream."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = VimMixer(config.hidden_size, state_size=config.state_size, conv_size=config.conv_size, expand=config.expand)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to the same."""
        out: Tensor = x + self.mixer(self.norm(x))
        return out


class _VisionMamba(nn.Module):
    """What both forms have."""

    def __init__(self, config: VimConfig, layers: list[nn.Module]) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_embed = PatchEmbed(config.in_channels, width, config.patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, config.patches + 1, width) * 0.02)
        self.layers = nn.ModuleList(layers)
        self.norm_f = RMSNorm(width, config.norm_eps)
        self.head = nn.Linear(width, config.num_classes)
        nn.init.zeros_(self.head.bias)
        scale_residual_branches([layer.get_submodule("mixer") for layer in layers])


class VisionMamba(_VisionMamba):
    """The bidirectional network on whole pictures."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__(config, [VimLayer(config) for _ in range(config.depth)])

    def forward(self, x: Tensor) -> Tensor:
        """Classifies pictures (B, in_channels, image_size, image_size), float32: logits (B, num_classes)."""
        patches = self.patch_embed(x)
        middle = patches.shape[1] // 2
        label = self.cls_token.expand(patches.shape[0], -1, -1)
        h = torch.cat([patches[:, :middle], label, patches[:, middle:]], dim=1) + self.pos_embed
        for layer in self.layers:
            h = layer(h)
        out: Tensor = self.head(self.norm_f(h[:, middle]))
        return out


class StreamingVisionMamba(_VisionMamba):
    """The unidirectional network on pieces of pictures, with states."""

    def __init__(self, config: VimConfig) -> None:
        def layer() -> nn.Module:
            mixer = Mamba1Block(config.hidden_size, state_size=config.state_size, conv_size=config.conv_size, expand=config.expand)
            return MambaLayer(config.hidden_size, mixer, config.norm_eps)

        super().__init__(config, [layer() for _ in range(config.depth)])

    def forward(self, patches: Tensor, first: Tensor, conv_states: Tensor, ssm_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classifies what has been seen of each picture after the next patches.

        Args:
            patches: The next patches in raster order (B, n, in_channels, patch_size, patch_size), float32.
            first: The position of the first of them (B,), int64; positions end below (image_size / patch_size)^2.
            conv_states: The last conv_size - 1 inputs of each layer's convolution (B, depth, E, conv_size - 1), float32; zeros at first.
            ssm_states: The state of each layer's scan (B, depth, E, N), float32; zeros at first.

        Returns:
            Logits (B, num_classes), and the states after the patches. The class token is not in the states.
        """
        table = self.pos_embed[0]
        positions = first.unsqueeze(1) + torch.arange(patches.shape[1], device=first.device)
        embedded = F.linear(patches.flatten(2), self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias)
        h = embedded + F.embedding(positions, table)
        label = (self.cls_token[0, 0] + table[-1]).expand(patches.shape[0], -1)
        conv_after, ssm_after = [], []
        layers = cast("list[MambaLayer]", self.layers)
        for layer, conv_state, ssm_state in zip(layers, conv_states.unbind(1), ssm_states.unbind(1), strict=True):
            h, conv, ssm = layer(h, conv_state, ssm_state)
            label = layer.step(label, conv, ssm)[0]
            conv_after.append(conv)
            ssm_after.append(ssm)
        return self.head(self.norm_f(label)), torch.stack(conv_after, dim=1), torch.stack(ssm_after, dim=1)


def _authors_layout() -> StateDictLayout:
    """The authors' checkpoints, as safetensors: the directions of a mixer lie beside each other, and the backward one ends in `_b`."""
    names = {"A_log": "forwards.A_log", "A_b_log": "backwards.A_log", "D": "forwards.D", "D_b": "backwards.D"}
    for part in ("conv1d", "x_proj", "dt_proj"):
        for kind in ("weight", "bias"):
            names |= {f"{part}.{kind}": f"forwards.{part}.{kind}", f"{part}_b.{kind}": f"backwards.{part}.{kind}"}

    def rename(key: str) -> str:
        found = re.fullmatch(r"(layers\.\d+\.mixer)\.(.+)", key)
        return key if found is None or found[2] not in names else f"{found[1]}.{names[found[2]]}"

    return StateDictLayout(
        "hustvl/Vim",
        lambda keys: "layers.0.mixer.A_b_log" in keys,
        lambda state: {rename(key): value for key, value in state.items()},
    )


_SOURCE = (
    "Zhu et al., Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, arXiv:2401.09417; "
    "read beside the authors' hustvl/Vim; blocks checked against mambapy"
)


@register_model(
    "vim-tiny",
    VimConfig(image_size=16, patch_size=4, num_classes=10, hidden_size=32, depth=2, state_size=4),
    summary="Vision Mamba with 2 bidirectional layers of width 32, for trying",
)
@register_model("vim-ti-16", VimConfig(), summary="Vim-Ti/16, 7 M parameters, 224x224 pictures")
@register_model("vim-s-16", VimConfig(hidden_size=384), summary="Vim-S/16, 26 M parameters, 224x224 pictures")
@register_model("vim-b-16", VimConfig(hidden_size=768), summary="Vim-B/16, 98 M parameters, 224x224 pictures")
def vim(config: VimConfig) -> ModelSpec:
    """A Vision Mamba."""
    size = config.image_size
    fixed = f"the positions pos_embed are learned for pictures of {size}x{size}; --set image_size=N has others"

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(rng.standard_normal((sizes["batch"], config.in_channels, size, size), dtype=np.float32))}

    return ModelSpec(
        build=lambda: VisionMamba(config).eval(),
        inputs=inputs,
        sizes={"batch": 2},
        dynamic={"x": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 64)},
        fixed={"x": {2: fixed, 3: fixed}},
        outputs=("logits",),
        source=_SOURCE,
        layouts=(_authors_layout(),),
    )


@register_model(
    "vim-stream-tiny",
    VimConfig(image_size=16, patch_size=4, num_classes=10, hidden_size=32, depth=2, state_size=4),
    summary="Vision Mamba with forward scans alone, pieces of a picture with states, for trying",
)
@register_model(
    "vim-stream-ti-16",
    VimConfig(image_size=1024),
    summary="Vim-Ti/16 with forward scans alone, pieces of a 1024x1024 picture with states",
)
@register_model(
    "vim-stream-s-16",
    VimConfig(image_size=1024, hidden_size=384),
    summary="Vim-S/16 with forward scans alone, pieces of a 1024x1024 picture with states",
)
def vim_stream(config: VimConfig) -> ModelSpec:
    """A unidirectional Vision Mamba over pieces of a picture."""
    states = {"conv_states": config.conv_size - 1, "ssm_states": config.state_size}

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch, count, side = sizes["batch"], sizes["patches"], config.patch_size
        drawn = {
            "patches": torch.from_numpy(rng.standard_normal((batch, count, config.in_channels, side, side), dtype=np.float32)),
            "first": torch.from_numpy(rng.integers(0, config.patches - count, batch, endpoint=True)),
        }
        for name, last in states.items():
            drawn[name] = torch.from_numpy(rng.standard_normal((batch, config.depth, config.inner, last), dtype=np.float32))
        return drawn

    piece = min(8, config.patches)
    return ModelSpec(
        build=lambda: StreamingVisionMamba(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "patches": piece},
        dynamic={"patches": {0: "batch", 1: "patches"}, "first": {0: "batch"}, **{name: {0: "batch"} for name in states}},
        # An engine has memory for the largest of each, and 16 whole pictures of 1024x1024 are 65,536 tokens.
        ranges={"batch": SizeRange(1, 2, 16), "patches": SizeRange(1, piece, config.patches)},
        outputs=("logits", *(f"last_{name}" for name in states)),
        source=_SOURCE,
    )
