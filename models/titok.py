"""TiTok: an image as a short sequence of tokens that have no place in it.

Yu et al., "An Image is Worth 32 Tokens for Reconstruction and Generation", arXiv:2406.07550; names and details are those of the authors'
code (github.com/bytedance/1d-tokenizer, `modeling/titok.py`, `modeling/modules/blocks.py`), so that their checkpoints, as safetensors, fit.

Encoder: a ViT over the patches of the image and K latent tokens; only the K come out, are projected to 12 channels, scaled to length one
and replaced by the nearest vector of a codebook, whose vectors have length one as well. Decoder: a ViT over the K vectors and a mask token
at each patch; only the patches come out.

- With `legacy`, as in the three published tokenizers, the decoder predicts a distribution over the 1024 codes of a MaskGIT-VQGAN at each
  patch, and that network's decoder makes the image of their mean vector. Also, the encoder's output (K, width) is read as (width, K) before
  the projection without a transposition; the authors kept that for their weights' sake, and so does this.
- Without, pixels are predicted directly, as in their later models. What that has in common with titok-pytorch is checked against it.

**Length.** With nested dropout (Rippel et al., arXiv:1402.0915; for tokenizers of this kind One-D-Piece, arXiv:2501.10064, and FlexTok,
arXiv:2502.13967) the first tokens carry the most, and any prefix is a description of the image. `length` is that prefix, for each image:
the vectors of the tokens after it are zero before they enter the decoder. FlexTok puts a learned mask token there, One-D-Piece shortens the
sequence; zeros need no weight that the published checkpoints lack. The full length is the published model, which was trained without
nested dropout.

With `legacy` a token is not a latent: read as (width, K), channel c of latent i goes to token (width i + c) mod K. In the published sizes,
where K divides width, token k is every K-th channel, from channel k on, of all latents. So a prefix of n tokens is n / K of the channels of
every latent, and no latent as a whole. The decoder is the same with and without: it gets the first n vectors, and zeros.

**Adaptive count.** The survey's sketch chooses the encoder's *width* from a complexity score that it leaves open, which no trained network
can follow. Here the number of tokens is chosen: with g the mean squared differences of neighbouring pixels, down and across, summed,

    complexity = g / (g + energy),        count = min_tokens + ceil((K - min_tokens) complexity)

(Adaptive Length Image Tokenization, arXiv:2411.02393, motivates such a count and learns it; this measure is ours, fixed and
without weights.) `encode` gives the count and the two means; `count` is a `length` for the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import Analysis, ModelSpec, SizeRange, register_model


@dataclass(frozen=True)
class TiTokConfig:
    """Settings of a TiTok tokenizer.

    Attributes:
        image_size: Height and width of the image.
        patch_size: Height and width of a patch.
        num_latent_tokens: K.
        width: Width of both ViTs.
        depth: Blocks of each.
        num_heads: Attention heads of each.
        token_size: Channels of a token.
        codebook_size: Vectors of the codebook.
        legacy: See the module's text.
        vqgan_channels: Channels of the MaskGIT-VQGAN's decoder at the highest resolution; with `legacy`.
        vqgan_mult: Multiples of that, from the highest resolution to the lowest.
        vqgan_z: Size of its codebook's vectors.
        vqgan_codes: Their number.
        min_tokens: The least count, for an image without any edge.
        energy: The squared gradient at which half of the tokens between the least count and K are used; pixels are in [0, 1].
        decode: Tokens to image instead of image to tokens.
    """

    image_size: int = 256
    patch_size: int = 16
    num_latent_tokens: int = 32
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    token_size: int = 12
    codebook_size: int = 4096
    legacy: bool = True
    vqgan_channels: int = 128
    vqgan_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    vqgan_z: int = 256
    vqgan_codes: int = 1024
    min_tokens: int = 1
    energy: float = 0.01
    decode: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size, got patch_size={self.patch_size}, image_size={self.image_size}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width, got num_heads={self.num_heads}, width={self.width}")
        if not 0 <= self.min_tokens <= self.num_latent_tokens:
            raise ValueError(f"min_tokens must be in [0, num_latent_tokens={self.num_latent_tokens}], got {self.min_tokens}")
        if self.energy <= 0:
            raise ValueError(f"energy must be above 0, got {self.energy}")
        if self.legacy and 2 ** (len(self.vqgan_mult) - 1) != self.patch_size:
            raise ValueError(
                f"vqgan_mult must have log2(patch_size) + 1 entries, got {len(self.vqgan_mult)} for patch_size={self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


class Attention(nn.Module):
    """Self-attention with the parameters of `nn.MultiheadAttention`, batch first: (B, N, D) to (B, N, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Every token sees all."""
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return out


class MLP(nn.Module):
    """Two layers and GELU, of four times the width between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class ResidualAttentionBlock(nn.Module):
    """A pre-norm transformer block, (B, N, D) to (B, N, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """Two residual steps."""
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class _ViT(nn.Module):
    """What encoder and decoder have in common: a class token, positions of patches and latents, blocks between two norms."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        width, scale = config.width, config.width**-0.5
        self.config = config
        self.class_embedding = nn.Parameter(scale * torch.randn(1, width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(config.grid**2 + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(scale * torch.randn(config.num_latent_tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(ResidualAttentionBlock(width, config.num_heads) for _ in range(config.depth))
        self.ln_post = nn.LayerNorm(width)

    def mix(self, patches: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, G^2, D) and latents (B or 1, K, D) through the blocks, in the same shapes."""
        batch, count = patches.shape[:2]
        patches = torch.cat([self.class_embedding.expand(batch, 1, -1), patches], 1) + self.positional_embedding
        latents = (latents + self.latent_token_positional_embedding).expand(batch, -1, -1)
        x = self.ln_pre(torch.cat([patches, latents], 1))
        for block in self.transformer:
            x = block(x)
        return x[:, 1 : 1 + count], x[:, 1 + count :]


class TiTokEncoder(_ViT):
    """Image to K vectors."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config)
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.conv_out = nn.Conv2d(config.width, config.token_size, 1)

    def forward(self, x: Tensor, latent_tokens: Tensor) -> Tensor:
        """Image (B, 3, H, W) and the latent tokens (K, D) to (B, K, token_size)."""
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        latents = self.ln_post(self.mix(patches, latent_tokens.unsqueeze(0))[1])
        batch, count, width = latents.shape
        planes = latents.reshape(batch, width, count) if self.config.legacy else latents.transpose(1, 2)
        out: Tensor = self.conv_out(planes.unsqueeze(-1)).squeeze(-1).transpose(1, 2)
        return out


class _Pixels(nn.ModuleList):
    """A predicted patch at each place to an image, (B, D, G, G) to (B, 3, H, W); a list for the sake of the authors' name `ffn.0`."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__([nn.Conv2d(width, 3 * patch_size**2, 1)])
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Channels are (row, column, colour) within the patch."""
        batch, _, grid, _ = x.shape
        p = self.patch_size
        y: Tensor = self[0](x).reshape(batch, p, p, 3, grid, grid)
        return y.permute(0, 3, 4, 1, 5, 2).reshape(batch, 3, grid * p, grid * p)


class TiTokDecoder(_ViT):
    """K vectors to an image, or with `legacy` to logits of the MaskGIT-VQGAN's codes."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config)
        width = config.width
        self.decoder_embed = nn.Linear(config.token_size, width)
        self.mask_token = nn.Parameter(width**-0.5 * torch.randn(1, 1, width))
        self.ffn: nn.Module
        self.conv_out: nn.Module
        if config.legacy:
            self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, config.vqgan_codes, 1))
            self.conv_out = nn.Identity()
        else:
            self.ffn = _Pixels(width, config.patch_size)
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Vectors (B, K, token_size) to (B, 3, H, W), or to (B, codes, G, G)."""
        grid = self.config.grid
        masks = self.mask_token.expand(z.shape[0], grid**2, -1)
        patches = self.ln_post(self.mix(masks, self.decoder_embed(z))[0])
        out: Tensor = self.conv_out(self.ffn(patches.transpose(1, 2).reshape(-1, self.config.width, grid, grid)))
        return out


class Quantizer(nn.Module):
    """A codebook of vectors that are used at length one."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, channels)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def forward(self, z: Tensor) -> Tensor:
        """Vectors (B, K, C) to the indices (B, K) int64 of the nearest; the lowest of those that are equally near."""
        # Between vectors of length one the nearest is that with the largest product.
        return torch.matmul(F.normalize(z, dim=-1), F.normalize(self.embedding.weight, dim=-1).t()).argmax(-1)

    def entries(self, indices: Tensor) -> Tensor:
        """Indices (B, K) to vectors (B, K, C) of length one."""
        return F.normalize(self.embedding(indices), dim=-1)


class ResnetBlock(nn.Module):
    """Two convolutions and a shortcut, (B, C, H, W) to (B, C', H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """The published shortcut, where the number of channels changes, reads the branch's output and not its input."""
        h: Tensor = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(h) if self.nin_shortcut is not None else x)


class UpsamplingBlock(nn.Module):
    """Two residual blocks, then twice the resolution except at the highest."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList([ResnetBlock(in_channels, out_channels, groups), ResnetBlock(out_channels, out_channels, groups)])
        self.upsample_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', 2 H, 2 W) or (B, C', H, W)."""
        for block in self.block:
            x = block(x)
        if self.upsample_conv is not None:
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class PixelDecoder(nn.Module):
    """The decoder of MaskGIT's VQGAN (Chang et al., arXiv:2202.04200; no attention), as in open-muse."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        channels = [config.vqgan_channels * m for m in config.vqgan_mult]
        groups = min(32, config.vqgan_channels)
        self.conv_in = nn.Conv2d(config.vqgan_z, channels[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResnetBlock(channels[-1], channels[-1], groups) for _ in range(2))
        above = [*channels[1:], channels[-1]]
        self.up = nn.ModuleList(
            UpsamplingBlock(given, out, groups, upsample=i > 0) for i, (given, out) in enumerate(zip(above, channels, strict=True))
        )
        self.norm_out = nn.GroupNorm(groups, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, vqgan_z, G, G) to (B, 3, H, W)."""
        x = self.conv_in(z)
        for block in self.mid:
            x = block(x)
        for level in range(len(self.up) - 1, -1, -1):
            x = self.up[level](x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class TiTok(nn.Module):
    """The tokenizer; both forms hold all weights, under the authors' names."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TiTokEncoder(config)
        self.decoder = TiTokDecoder(config)
        self.latent_tokens = nn.Parameter(config.width**-0.5 * torch.randn(config.num_latent_tokens, config.width))
        self.quantize = Quantizer(config.codebook_size, config.token_size)
        if config.legacy:
            self.pixel_quantize = nn.Module()
            self.pixel_quantize.embedding = nn.Embedding(config.vqgan_codes, config.vqgan_z)
            self.pixel_decoder = PixelDecoder(config)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image (B, 3, H, W) to indices (B, K) int64, count (B,) int64 and gradients (B, 2) float32; see `gradients`."""
        gradients = self.gradients(x)
        energy = gradients.sum(-1)
        complexity = energy / (energy + self.config.energy)
        spare = self.config.num_latent_tokens - self.config.min_tokens
        count = self.config.min_tokens + torch.ceil(spare * complexity).long()
        return self.quantize(self.encoder(x, self.latent_tokens)), count, gradients

    def gradients(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) to the mean squared difference of neighbouring pixels, down and across, (B, 2)."""
        down, across = x[:, :, 1:] - x[:, :, :-1], x[:, :, :, 1:] - x[:, :, :, :-1]
        return torch.stack([(down * down).mean((1, 2, 3)), (across * across).mean((1, 2, 3))], -1)

    def decode(self, indices: Tensor, length: Tensor) -> Tensor:
        """Indices (B, K) int64, and of how many of them to make the image (B,) int64, to (B, 3, H, W)."""
        kept = torch.arange(self.config.num_latent_tokens, device=indices.device) < length.unsqueeze(-1)
        out: Tensor = self.decoder(self.quantize.entries(indices) * kept.unsqueeze(-1).float())
        if self.config.legacy:
            table: Tensor = self.pixel_quantize.embedding.weight  # type: ignore[assignment, union-attr]  # there in the legacy form
            mean = torch.matmul(out.softmax(1).permute(0, 2, 3, 1), table)
            out = self.pixel_decoder(mean.permute(0, 3, 1, 2))
        return out


class TiTokEncode(TiTok):
    """Image to tokens."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `encode`."""
        return self.encode(x)


class TiTokDecode(TiTok):
    """Tokens to image."""

    def forward(self, indices: Tensor, length: Tensor) -> Tensor:
        """See `decode`."""
        return self.decode(indices, length)


@register_model(
    "titok-encode-tiny",
    TiTokConfig(
        image_size=16, patch_size=4, num_latent_tokens=8, width=32, depth=2, num_heads=2, token_size=4, codebook_size=32, legacy=False
    ),
    summary="TiTok of width 32, 16x16 image to 8 tokens, for trying",
)
@register_model(
    "titok-decode-tiny",
    TiTokConfig(
        image_size=16,
        patch_size=4,
        num_latent_tokens=8,
        width=32,
        depth=2,
        num_heads=2,
        token_size=4,
        codebook_size=32,
        legacy=False,
        decode=True,
    ),
    summary="8 tokens of titok-encode-tiny to a 16x16 image",
)
@register_model(
    "titok-encode-legacy-tiny",
    TiTokConfig(
        image_size=16,
        patch_size=4,
        num_latent_tokens=8,
        width=32,
        depth=2,
        num_heads=2,
        token_size=4,
        codebook_size=32,
        vqgan_channels=8,
        vqgan_mult=(1, 2, 2),
        vqgan_z=6,
        vqgan_codes=10,
    ),
    summary="titok-encode-tiny in the form of the published tokenizers",
)
@register_model(
    "titok-decode-legacy-tiny",
    TiTokConfig(
        image_size=16,
        patch_size=4,
        num_latent_tokens=8,
        width=32,
        depth=2,
        num_heads=2,
        token_size=4,
        codebook_size=32,
        vqgan_channels=8,
        vqgan_mult=(1, 2, 2),
        vqgan_z=6,
        vqgan_codes=10,
        decode=True,
    ),
    summary="8 tokens of titok-encode-legacy-tiny to a 16x16 image, through a MaskGIT-VQGAN",
)
@register_model("titok-encode-l-32", TiTokConfig(), summary="TiTok-L-32: 256x256 image to 32 tokens")
@register_model("titok-decode-l-32", TiTokConfig(decode=True), summary="TiTok-L-32: 32 tokens to a 256x256 image")
@register_model(
    "titok-encode-b-64",
    TiTokConfig(num_latent_tokens=64, width=768, depth=12, num_heads=12),
    summary="TiTok-B-64: 256x256 image to 64 tokens",
)
@register_model(
    "titok-decode-b-64",
    TiTokConfig(num_latent_tokens=64, width=768, depth=12, num_heads=12, decode=True),
    summary="TiTok-B-64: 64 tokens to a 256x256 image",
)
@register_model(
    "titok-encode-s-128",
    TiTokConfig(num_latent_tokens=128, width=512, depth=8, num_heads=8),
    summary="TiTok-S-128: 256x256 image to 128 tokens",
)
@register_model(
    "titok-decode-s-128",
    TiTokConfig(num_latent_tokens=128, width=512, depth=8, num_heads=8, decode=True),
    summary="TiTok-S-128: 128 tokens to a 256x256 image",
)
def titok(config: TiTokConfig) -> ModelSpec:
    """A TiTok tokenizer, one way."""
    size, count = config.image_size, config.num_latent_tokens

    def image(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        noise = rng.random((sizes["batch"], 3, size, size), dtype=np.float32)
        striped = 0.5 * noise + 0.5 * noise.mean(3, keepdims=True)  # as much varies down as across in no picture
        contrast = rng.random((sizes["batch"], 1, 1, 1), dtype=np.float32)  # so that counts differ
        return {"x": torch.from_numpy(0.5 + (striped - 0.5) * contrast)}

    def tokens(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {
            "indices": torch.from_numpy(rng.integers(0, config.codebook_size, (sizes["batch"], count))),
            "length": torch.from_numpy(rng.integers(1, count, sizes["batch"], endpoint=True)),
        }

    positions = f"the positions are learned for images of {size}x{size}; --set image_size=N makes a model for another size"
    latents = f"the model has {count} latent tokens; shorter sequences are given by the input `length`"
    return ModelSpec(
        build=lambda: (TiTokDecode if config.decode else TiTokEncode)(config).eval(),
        inputs=tokens if config.decode else image,
        sizes={"batch": 2},
        dynamic={name: {0: "batch"} for name in (("indices", "length") if config.decode else ("x",))},
        ranges={"batch": SizeRange(1, 2, 16)},
        fixed={"indices": {1: latents}} if config.decode else {"x": {2: positions, 3: positions}},
        outputs=("image",) if config.decode else ("indices", "count", "gradients"),
        source="Yu et al., An Image is Worth 32 Tokens for Reconstruction and Generation, arXiv:2406.07550; code of bytedance/1d-tokenizer",
        analyses=()
        if config.decode
        else (
            Analysis("entropy", outputs=("indices",), settings={"size": config.codebook_size, "agreement": 0.99}),
            Analysis("mutual-information", inputs=("x",), outputs=("indices",)),
        ),
    )
