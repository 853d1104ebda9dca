"""DiffuSSM: a diffusion backbone without attention and without patches, with bidirectional Mamba mixers.

Yan, Gu and Rush, "Diffusion Models Without Attention", arXiv:2311.18257. The latents are flattened in raster order to L = H * W tokens; a
state space model (SSM) runs over all of them in both directions. What is short is the dense part, which gives the network the shape of an
hourglass: the residual stream has J = L / M positions of width D, each standing for M neighbouring tokens, and a block is

    U = gelu(W_up gelu(W_0 I))        I (J, D) -> U (L, E)      every position is spread over its M tokens
    Y = bidirectional SSM(U)          (L, E) -> (L, E)
    V = gelu(W_down Y)                (L, E) -> (J, E)          every token fills E / M of its position's E channels
    O = W_3(gelu(W_2 V) * gelu(W_1 I))                          the hourglass's skip is fused by a product

with E = 2 D, which is (9 + 2 M) D^2 weights a block: 13 D^2 at the paper's M = 2. The block's input is normalised and modulated by time
and class (AdaLN-Zero, Peebles and Xie, arXiv:2212.09748) and its output is gated onto the stream.

What differs from the paper, and why:

- **The SSM is Mamba's.** The paper uses S4D. Here each direction is the core of a Mamba-1 block (Gu and Dao, arXiv:2312.00752): depthwise
  causal convolution, SiLU, input-dependent delta, B and C, selective scan. Mamba's own input projection, gate and output projection are
  left out, because W_up, the fusing product and W_3 are these already. The two directions have weights of their own and are added, as the
  two kernels of a bidirectional S4D are.
- **Tokens keep their own embedding.** Each latent is embedded by itself into D / M channels, and M neighbours are laid side by side.
- **Position.** The paper names no position embedding, and the published size has none; `position_embedding` adds a learned one.

Of `diffussm-xl`, the paper gives depth 29, D = 1152, M = 2 and 673 M parameters. `diffussm-xl` has 648.3 M, with another SSM: a block's
two Mamba cores have 0.92 M, where the paper's count leaves 1.77 M to its SSM if all else is as here; it is not broken down there. Inferred:
E = 2 D and the order of the dense layers, which are what agrees with 13 D^2; N = 16, a convolution of 4 and delta of rank D / 16 are
Mamba's defaults; embedders, AdaLN, final layer and the predicted variance are DiT's.

The survey's sketch of DiffuSSM (SSM, then a feed-forward layer, both at full length) has neither the hourglass nor the second direction nor
any conditioning path, and is not this network.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, register_model
from .flow import digits_sampler
from .layers import LabelEmbedder, TimestepEmbedder, class_conditional_inputs, modulate
from .mamba import MambaCore


@dataclass(frozen=True)
class DiffuSSMConfig:
    """Settings of a DiffuSSM.

    Attributes:
        input_size: Height and width of the latents.
        in_channels: Channels of the latents.
        hidden_size: D, width of the residual stream.
        depth: Number of blocks.
        hourglass: M, tokens a position of the residual stream stands for; divides `input_size` and D.
        expand: E / D, width of the SSM over that of the stream.
        state_size: N, state of the SSM per channel.
        conv_size: Width of Mamba's causal convolution.
        num_classes: Number of classes; label `num_classes` stands for "no class".
        learn_sigma: The network predicts a variance besides the noise, and its output has twice the channels.
        position_embedding: Add a learned embedding of the position.
    """

    input_size: int = 32
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 29
    hourglass: int = 2
    expand: int = 2
    state_size: int = 16
    conv_size: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    position_embedding: bool = False

    def __post_init__(self) -> None:
        for name in ("input_size", "in_channels", "hidden_size", "depth", "hourglass", "expand", "state_size", "conv_size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.input_size % self.hourglass or self.hidden_size % self.hourglass:
            raise ValueError(
                f"hourglass must divide input_size and hidden_size, got hourglass={self.hourglass}, "
                f"input_size={self.input_size}, hidden_size={self.hidden_size}"
            )


class BidirectionalMamba(nn.Module):
    """Two Mamba cores over the tokens in raster order and in reverse, added."""

    def __init__(self, channels: int, state_size: int, conv_size: int, dt_rank: int) -> None:
        super().__init__()
        self.forwards = MambaCore(channels, state_size, conv_size, dt_rank)
        self.backwards = MambaCore(channels, state_size, conv_size, dt_rank, reverse=True)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes (B, L, d) along L, each token seeing all."""
        y: Tensor = self.forwards(x) + self.backwards(x)
        return y


def _modulation(width: int, parts: int) -> nn.Sequential:
    # AdaLN-Zero: the gates start at 0, so that every block starts as the identity.
    linear = nn.Linear(width, parts * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


class DiffuSSMBlock(nn.Module):
    """A gated bidirectional SSM in hourglass form (see the module's text for the formulas)."""

    def __init__(self, config: DiffuSSMConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.expand * config.hidden_size
        self.hourglass = config.hourglass
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = _modulation(width, 3)
        self.w0 = nn.Linear(width, width)
        self.up = nn.Linear(width, config.hourglass * inner)
        self.mixer = BidirectionalMamba(inner, config.state_size, config.conv_size, dt_rank=math.ceil(width / 16))
        self.down = nn.ModuleList(nn.Linear(inner, inner // config.hourglass) for _ in range(config.hourglass))
        self.w1 = nn.Linear(width, width)
        self.w2 = nn.Linear(inner, width)
        self.w3 = nn.Linear(width, width)
        # Torch's default would shrink the signal at each of the five dense layers, and the branch would start out nearly silent.
        for layer in (self.w0, self.up, *self.down, self.w1, self.w2, self.w3):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Maps the stream (B, J, D), given the condition (B, D), to (B, J, D)."""
        batch, positions, _ = x.shape
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)
        h = modulate(self.norm(x), shift, scale)
        spread = F.gelu(self.up(F.gelu(self.w0(h)))).reshape(batch, positions * self.hourglass, -1)
        mixed = self.mixer(spread).reshape(batch, positions, self.hourglass, -1)
        gathered = F.gelu(torch.cat([down(mixed[:, :, place]) for place, down in enumerate(self.down)], dim=-1))
        fused = F.gelu(self.w2(gathered)) * F.gelu(self.w1(h))
        out: Tensor = x + gate.unsqueeze(1) * self.w3(fused)
        return out


class FinalLayer(nn.Module):
    """Adaptive layer norm and the projection to the M tokens of each position."""

    def __init__(self, config: DiffuSSMConfig, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation = _modulation(config.hidden_size, 2)
        self.linear = nn.Linear(config.hidden_size, config.hourglass * out_channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Maps (B, J, D) to (B, J, M * out_channels)."""
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return out


class DiffuSSM(nn.Module):
    """The network: latents, times and labels to a prediction for each latent."""

    def __init__(self, config: DiffuSSMConfig) -> None:
        super().__init__()
        self.config = config
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        width = config.hidden_size
        self.x_embedder = nn.Linear(config.in_channels, width // config.hourglass)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        positions = config.input_size**2 // config.hourglass
        self.pos_embed = nn.Parameter(torch.randn(1, positions, width) * 0.02) if config.position_embedding else None
        self.blocks = nn.ModuleList(DiffuSSMBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, self.out_channels)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predicts noise or velocity.

        Args:
            x: Noised latents (B, C, H, W) float32.
            t: Times (B,) float32 in [0, 1000].
            y: Labels (B,) int64 in [0, num_classes]; num_classes stands for "no class".

        Returns:
            (B, C, H, W), or (B, 2 C, H, W) with `learn_sigma`.
        """
        batch, channels, height, width = x.shape
        tokens = x.reshape(batch, channels, height * width).transpose(1, 2)
        h = self.x_embedder(tokens).reshape(batch, -1, self.config.hidden_size)
        if self.pos_embed is not None:
            h = h + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, condition)
        out: Tensor = self.final_layer(h, condition).reshape(batch, height * width, self.out_channels)
        return out.transpose(1, 2).reshape(batch, self.out_channels, height, width)


@register_model(
    "diffussm-tiny",
    DiffuSSMConfig(input_size=8, hidden_size=32, depth=2, state_size=4, num_classes=10),
    summary="DiffuSSM with 2 blocks of width 32, for trying",
)
@register_model(
    "diffussm-small",
    DiffuSSMConfig(hidden_size=384, depth=12),
    summary="DiffuSSM with 12 blocks of width 384, 31 M parameters, 32x32 latents",
)
@register_model(
    "diffussm-xl", DiffuSSMConfig(), summary="DiffuSSM-XL with Mamba mixers, 648 M parameters (the paper's S4D: 673 M), 32x32 latents"
)
def diffussm(config: DiffuSSMConfig) -> ModelSpec:
    """A DiffuSSM with Mamba mixers."""
    return ModelSpec(
        build=lambda: DiffuSSM(config).eval(),
        inputs=class_conditional_inputs(channels=config.in_channels, size=config.input_size, classes=config.num_classes),
        sizes={"batch": 2},
        dynamic={name: {0: "batch"} for name in ("x", "t", "y")},
        ranges={"batch": SizeRange(1, 2, 64)},
        outputs=("sample",),
        source="Yan, Gu & Rush, Diffusion Models Without Attention, arXiv:2311.18257; mixer: Gu & Dao, Mamba, arXiv:2312.00752",
    )


@register_model(
    "diffussm-digits",
    DiffuSSMConfig(
        input_size=8,
        in_channels=1,
        hidden_size=96,
        depth=4,
        expand=1,
        state_size=4,
        num_classes=10,
        learn_sigma=False,
        position_embedding=True,
    ),
    summary="DiffuSSM for 8x8 digits by class, 0.5 M parameters, rectified flow",
)
def diffussm_digits(config: DiffuSSMConfig) -> ModelSpec:
    """A DiffuSSM trained on scikit-learn's digits."""
    return dataclasses.replace(
        diffussm(config),
        ranges={"batch": SizeRange(1, 40, 64)},
        weights=Path(__file__).parent / "weights" / "diffussm-digits.safetensors",
        sampler=digits_sampler(),
    )
