"""DiT: a diffusion transformer on image patches, conditioned by adaptive layer norm (Peebles & Xie, arXiv:2212.09748).

Checked against the authors' code (facebookresearch/DiT, models.py), whose parameter names are kept, and against diffusers'
DiTTransformer2DModel. The latter deviates from the former in two numbers, which are settings here: the frequencies of the timestep
embedding (`frequency_shift=1`) and the epsilon of the layer norm before the MLP (`mlp_norm_eps=1e-5` by default there). The released
weights were trained with the authors' numbers, which are the defaults here, whatever layout the weights come in.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model
from ..exporter.weights import fuse, same_in_all
from .flow import digits_sampler
from .layers import LabelEmbedder, PatchEmbed, TimestepEmbedder, class_conditional_inputs, modulate, sincos_2d


@dataclass(frozen=True)
class DiTConfig:
    """Settings of a DiT.

    Attributes:
        input_size: Height and width of the input; a multiple of `patch_size`. Fixed, because the position table is.
        patch_size: Height and width of a patch, which becomes one token.
        in_channels: Channels of the input.
        hidden_size: Channels of a token; a multiple of 4 and of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads in a block.
        mlp_ratio: Channels inside the MLP, relative to `hidden_size`.
        num_classes: Classes; label `num_classes` means no class.
        learn_sigma: True when the model predicts a variance beside the noise, in as many further channels.
        frequency_shift: See `timestep_embedding`; 1 computes what diffusers computes.
        mlp_norm_eps: Epsilon of the layer norm before each MLP; 1e-5 computes what diffusers computes by default.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    frequency_shift: int = 0
    mlp_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.input_size, self.patch_size, self.in_channels, self.hidden_size, self.depth, self.num_heads, self.num_classes) < 1:
            raise ValueError("every size of a DiT must be at least 1")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size must be a multiple of patch_size, got {self.input_size} and {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of num_heads and of 4, got {self.hidden_size} and {self.num_heads} heads")

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (2 if self.learn_sigma else 1)


class Attention(nn.Module):
    """Multi-head softmax attention among the tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D / heads)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) to (…, dim)."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero, section 3.2 of the paper).

    The modulation starts at zero, so every block starts as the identity.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=config.mlp_norm_eps, elementwise_affine=False)
        self.mlp = MLP(dim, int(dim * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) and condition c (B, D) to (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        out: Tensor = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return out


class FinalLayer(nn.Module):
    """Modulated layer norm, then each token to the pixels of its patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) and condition c (B, D) to (B, N, patch_size^2 out_channels)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class DiT(nn.Module):
    """The whole model: noisy latents, timesteps and classes to the predicted noise (and variance)."""

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = config.input_size // config.patch_size
        self.x_embedder = PatchEmbed(config.in_channels, config.hidden_size, config.patch_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size, frequency_shift=config.frequency_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        self.register_buffer("pos_embed", sincos_2d(config.hidden_size, self.grid, self.grid)[None], persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))  # as a linear layer
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for block in (*self.blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predicts the noise in `x`.

        Args:
            x: (B, in_channels, input_size, input_size), float32.
            t: (B,), float32, in [0, 1000].
            y: (B,), int64, in [0, num_classes]; `num_classes` means no class.

        Returns:
            (B, out_channels, input_size, input_size), float32; with `learn_sigma` the second half of the channels is the variance.
        """
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        tokens = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self._unpatchify(self.final_layer(tokens, c))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        p, channels = self.config.patch_size, self.config.out_channels
        pixels = tokens.reshape(tokens.shape[0], self.grid, self.grid, p, p, channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], channels, self.grid * p, self.grid * p)


def _authors_layout(config: DiTConfig) -> StateDictLayout:
    """The authors' checkpoints, as safetensors: our names, and the position table, which is recomputed here."""
    table = (1, (config.input_size // config.patch_size) ** 2, config.hidden_size)

    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # A table of another shape belongs to another input size: it stays, and is reported as unexpected.
        return {key: value for key, value in state.items() if key != "pos_embed" or tuple(value.shape) != table}

    return StateDictLayout("facebookresearch/DiT", lambda keys: {"pos_embed", "x_embedder.proj.weight"} <= keys, convert)


_DIFFUSERS_NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_DIFFUSERS_BLOCK_NAMES = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_DIFFUSERS_EMBEDDERS = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}


def _from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    for key in state:
        name, _, kind = key.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
        if block is None:
            converted[f"{_DIFFUSERS_NAMES[name]}.{kind}" if name in _DIFFUSERS_NAMES else key] = state[key]
            continue
        index, part = block.groups()
        if part in _DIFFUSERS_BLOCK_NAMES:
            converted[f"blocks.{index}.{_DIFFUSERS_BLOCK_NAMES[part]}.{kind}"] = state[key]
        elif part in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            attn = f"transformer_blocks.{index}.attn1"
            fuse(state, [f"{attn}.to_{x}.{kind}" for x in "qkv"], converted, f"blocks.{index}.attn.qkv.{kind}")
        elif part in _DIFFUSERS_EMBEDDERS:
            # Every block there carries a copy of the timestep and class embedders.
            pattern = re.compile(rf"transformer_blocks\.\d+\.{re.escape(part)}\.{kind}")
            same_in_all(state, [other for other in state if pattern.fullmatch(other)], converted, f"{_DIFFUSERS_EMBEDDERS[part]}.{kind}")
        else:
            converted[key] = state[key]
    return converted


def _diffusers_layout(config: DiTConfig) -> StateDictLayout:
    return StateDictLayout(
        "diffusers",
        lambda keys: "pos_embed.proj.weight" in keys,
        _from_diffusers,
        # Not compared: norm_eps, see the module's docstring.
        config={
            "num_attention_heads": config.num_heads,
            "attention_head_dim": config.hidden_size // config.num_heads,
            "num_layers": config.depth,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "sample_size": config.input_size,
            "patch_size": config.patch_size,
            "num_embeds_ada_norm": config.num_classes,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
        },
    )


@register_model(
    "dit-tiny",
    DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10),
    summary="DiT with 2 blocks of width 32, for trying",
)
@register_model("dit-s-2", DiTConfig(hidden_size=384, depth=12, num_heads=6), summary="DiT-S/2, 33 M parameters, 32x32 latents")
@register_model("dit-b-2", DiTConfig(hidden_size=768, depth=12, num_heads=12), summary="DiT-B/2, 130 M parameters, 32x32 latents")
@register_model("dit-l-2", DiTConfig(hidden_size=1024, depth=24, num_heads=16), summary="DiT-L/2, 458 M parameters, 32x32 latents")
@register_model("dit-xl-2", DiTConfig(hidden_size=1152, depth=28, num_heads=16), summary="DiT-XL/2, 675 M parameters, 32x32 latents")
def dit(config: DiTConfig) -> ModelSpec:
    """A DiT; weights may come in the authors' layout or in diffusers'."""
    size = config.input_size
    fixed = f"the position table pos_embed is computed for latents of {size}x{size}; --set input_size=N computes it for another size"
    return ModelSpec(
        build=lambda: DiT(config).eval(),
        inputs=class_conditional_inputs(channels=config.in_channels, size=config.input_size, classes=config.num_classes),
        sizes={"batch": 2},
        dynamic={name: {0: "batch"} for name in ("x", "t", "y")},
        ranges={"batch": SizeRange(1, 2, 16)},
        fixed={"x": {2: fixed, 3: fixed}},
        outputs=("sample",),
        source="Peebles & Xie, Scalable Diffusion Models with Transformers, arXiv:2212.09748; checked against diffusers",
        layouts=(_authors_layout(config), _diffusers_layout(config)),
    )


@register_model(
    "dit-digits",
    DiTConfig(input_size=8, in_channels=1, hidden_size=64, depth=8, num_heads=4, num_classes=10, learn_sigma=False),
    summary="DiT for 8x8 digits by class, 0.6 M parameters, rectified flow",
)
def dit_digits(config: DiTConfig) -> ModelSpec:
    """A DiT trained on scikit-learn's digits."""
    return dataclasses.replace(
        dit(config),
        ranges={"batch": SizeRange(1, 40, 64)},
        weights=Path(__file__).parent / "weights" / "dit-digits.safetensors",
        sampler=digits_sampler(),
    )
