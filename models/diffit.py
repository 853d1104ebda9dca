"""DiffiT: a diffusion transformer whose attention itself depends on the time (Hatamizadeh et al., arXiv:2312.02139).

The latent model of the paper. A token c of time and class enters every attention (time-dependent multi-head self-attention, TMSA,
equations 3 to 6), and nothing else does:

    q = x W_qs + c W_qt,  k = x W_ks + c W_kt,  v = x W_vs + c W_vt
    TMSA(x, c) = softmax(q k^T / sqrt(d) + B) v
    x <- x + TMSA(LN(x), c);  x <- x + MLP(LN(x))

with B a learned bias for each head and each offset between two patches. There is no adaptive layer norm, so that a block has fewer
parameters than DiT's. The released models have 30 blocks and 601 M parameters; the paper's 16.88 % less than DiT-XL/2's (561 M) is what
28 blocks have, the depth of DiT-XL/2. (The survey's 19.85 % compare with MDT-G.)

Checked against the authors' code (NVlabs/DiffiT, diffit/diffit.py), whose parameter names are kept. What the paper leaves open is as there:
the table of fixed positions added to the patches, which B joins and does not replace; the linear projections of c have a bias of their
own; the last layer is linear(SiLU(LN(x))), and has no condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model
from .dit import MLP
from .layers import LabelEmbedder, PatchEmbed, TimestepEmbedder, class_conditional_inputs, sincos_2d


@dataclass(frozen=True)
class DiffiTConfig:
    """Settings of a latent DiffiT.

    Attributes:
        input_size: Height and width of the latents; a multiple of `patch_size`. Fixed, because the tables of positions and offsets are.
        patch_size: Height and width of a patch, which becomes one token.
        in_channels: Channels of the latents.
        hidden_size: Channels of a token; a multiple of 4 and of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads in a block.
        mlp_ratio: Channels inside the MLP, relative to `hidden_size`.
        num_classes: Classes; label `num_classes` means no class.
        learn_sigma: True when the model predicts a variance beside the noise, in as many further channels.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 30
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        if min(self.input_size, self.patch_size, self.in_channels, self.hidden_size, self.depth, self.num_heads, self.num_classes) < 1:
            raise ValueError("every size of a DiffiT must be at least 1")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size must be a multiple of patch_size, got {self.input_size} and {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of num_heads and of 4, got {self.hidden_size} and {self.num_heads} heads")

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def grid(self) -> int:
        """Patches in a row."""
        return self.input_size // self.patch_size


def offsets(grid: int) -> Tensor:
    """For each pair of patches of a square grid, the row of the bias table that belongs to their offset.

    Args:
        grid: Patches in a row.

    Returns:
        (grid^2, grid^2) int64: (dy + grid - 1)(2 grid - 1) + dx + grid - 1 for the offset from the second patch to the first. Always on
        the CPU: a model built on the meta device keeps a real table.
    """
    places = torch.arange(grid, device="cpu")
    distance = places[:, None] - places + grid - 1
    rows, columns = distance.repeat_interleave(grid, 0).repeat_interleave(grid, 1), distance.repeat(grid, grid)
    return rows * (2 * grid - 1) + columns


class TimeDependentAttention(nn.Module):
    """TMSA: multi-head attention whose queries, keys and values depend on the condition (equations 3 to 6 of the paper)."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, grid: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_temb = nn.Linear(dim, 3 * dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * grid - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", offsets(grid), persistent=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) and condition c (B, D) to (B, N, D)."""
        qkv = self.qkv(x) + self.qkv_temb(c).unsqueeze(1)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D / heads)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)  # (1, heads, N, N)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
        return out


class DiffiTBlock(nn.Module):
    """Time-dependent attention, then an MLP."""

    def __init__(self, config: DiffiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = TimeDependentAttention(dim, config.num_heads, config.grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(dim, int(dim * config.mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) and condition c (B, D) to (B, N, D)."""
        x = x + self.attn(self.norm1(x), c)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class FinalLayer(nn.Module):
    """Layer norm, SiLU, and each token to the pixels of its patch."""

    def __init__(self, config: DiffiTConfig) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, patch_size^2 out_channels)."""
        out: Tensor = self.linear(F.silu(self.norm_final(x)))
        return out


class DiffiT(nn.Module):
    """The whole model: noisy latents, timesteps and classes to the predicted noise (and variance)."""

    pos_embed: Tensor

    def __init__(self, config: DiffiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.in_channels, config.hidden_size, config.patch_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        self.register_buffer("pos_embed", sincos_2d(config.hidden_size, config.grid, config.grid)[None], persistent=False)
        self.blocks = nn.ModuleList(DiffiTBlock(config) for _ in range(config.depth))
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
        p, grid, channels = self.config.patch_size, self.config.grid, self.config.out_channels
        pixels = self.final_layer(tokens).reshape(tokens.shape[0], grid, grid, p, p, channels)
        out: Tensor = pixels.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], channels, grid * p, grid * p)
        return out


def _authors_layout(config: DiffiTConfig) -> StateDictLayout:
    """The authors' checkpoints, as safetensors: our names, and tables that are recomputed here."""
    tables: dict[str, tuple[int, ...]] = {"pos_embed": (1, config.grid**2, config.hidden_size)}
    tables |= {f"blocks.{i}.attn.relative_position_index": (config.grid**2,) * 2 for i in range(config.depth)}

    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # A table of another shape belongs to another input size: it stays, and is reported as unexpected.
        return {key: value for key, value in state.items() if tables.get(key) != tuple(value.shape)}

    return StateDictLayout("NVlabs/DiffiT", lambda keys: {"pos_embed", "blocks.0.attn.relative_position_index"} <= keys, convert)


@register_model(
    "diffit-tiny",
    DiffiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10),
    summary="DiffiT with 2 blocks of width 32, for trying",
)
@register_model("diffit-xl-2", DiffiTConfig(), summary="latent DiffiT of ImageNet-256, 601 M parameters, 32x32 latents")
@register_model("diffit-xl-2-512", DiffiTConfig(input_size=64), summary="latent DiffiT of ImageNet-512, 64x64 latents")
def diffit(config: DiffiTConfig) -> ModelSpec:
    """A latent DiffiT; weights may come in the authors' layout."""
    size = config.input_size
    fixed = f"the tables of positions and offsets are those of latents of {size}x{size}; --set input_size=N makes them for another size"
    return ModelSpec(
        build=lambda: DiffiT(config).eval(),
        inputs=class_conditional_inputs(channels=config.in_channels, size=config.input_size, classes=config.num_classes),
        sizes={"batch": 2},
        dynamic={name: {0: "batch"} for name in ("x", "t", "y")},
        ranges={"batch": SizeRange(1, 2, 16)},
        fixed={"x": {2: fixed, 3: fixed}},
        outputs=("sample",),
        source="Hatamizadeh et al., DiffiT: Diffusion Vision Transformers for Image Generation, arXiv:2312.02139; code: NVlabs/DiffiT",
        layouts=(_authors_layout(config),),
    )
