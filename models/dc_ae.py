"""DC-AE: the deep compression autoencoder, whose latents have 1/32 of a picture's height and width (Chen et al., arXiv:2410.10733).

This is the form that SANA uses (Xie et al., arXiv:2410.10629, section 2.1; `dc-ae-f32c32-sana-1.0` and `-1.1` by mit-han-lab). Its last
stages are EfficientViT blocks (Cai et al., arXiv:2205.14756): linear attention at several scales, then a gated convolution. Checked
against diffusers' AutoencoderDC and read beside the authors' code (mit-han-lab/efficientvit, models/efficientvit/dc_ae.py):

- Encoder and decoder are two models here, because they are used apart. One checkpoint holds both; each takes its half.
- The authors and diffusers compute attention among at most `head_dim` positions as a table of scores; it is the same function, and here
  the products are always taken in the other order.
- The latents are those of the network: `scaling_factor` (0.41407 for SANA) belongs to the pipeline around it.

The models for ImageNet (`-in-1.0`, `-mix-1.0`) begin with an empty stage, have batch normalisation in the decoder and no multi-scale
branch: they are other architectures.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model
from ..exporter.weights import fuse
from .sana import relu_linear_attention


@dataclass(frozen=True)
class DCAEConfig:
    """Settings of a DC-AE; encoder and decoder have one configuration.

    Attributes:
        in_channels: Channels of a picture.
        latent_channels: Channels of the latents; a divisor of the last width.
        widths: Channels of each stage. Between two stages the resolution halves, and the width stays, doubles or quadruples.
        encoder_depths: Blocks in each of the encoder's stages.
        decoder_depths: Blocks in each of the decoder's stages.
        attention_stages: How many of the last stages have EfficientViT blocks; the others have residual convolutions.
        head_dim: Channels of an attention head; a divisor of the widths of the last `attention_stages`.
        scales: Sizes of the depthwise convolutions that make further queries, keys and values; odd.
        sample_size: Height and width of the example picture, a multiple of the compression factor.
    """

    in_channels: int = 3
    latent_channels: int = 32
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    attention_stages: int = 3
    head_dim: int = 32
    scales: tuple[int, ...] = (5,)
    sample_size: int = 512

    def __post_init__(self) -> None:
        sizes = (self.in_channels, self.latent_channels, *self.widths, *self.encoder_depths, *self.decoder_depths, self.head_dim)
        if not self.widths or min(*sizes, self.sample_size) < 1:
            raise ValueError("every size of a DC-AE must be at least 1")
        if not len(self.widths) == len(self.encoder_depths) == len(self.decoder_depths):
            raise ValueError(
                "widths, encoder_depths and decoder_depths must be equally long, "
                f"got {len(self.widths)}, {len(self.encoder_depths)} and {len(self.decoder_depths)}"
            )
        if not 0 <= self.attention_stages <= len(self.widths):
            raise ValueError(f"attention_stages must be in [0, {len(self.widths)}], got {self.attention_stages}")
        for first, second in itertools.pairwise(self.widths):
            if second not in (first, 2 * first, 4 * first):
                raise ValueError(f"a width must be 1, 2 or 4 times the one before it, got {self.widths}")
        if self.widths[-1] % self.latent_channels:
            raise ValueError(f"the last width must be a multiple of latent_channels, got {self.widths[-1]} and {self.latent_channels}")
        if any(width % self.head_dim for width in self.widths[len(self.widths) - self.attention_stages :]):
            raise ValueError(f"widths with attention must be multiples of head_dim, got {self.widths} and {self.head_dim}")
        if any(scale < 1 or scale % 2 == 0 for scale in self.scales):
            raise ValueError(f"scales must be odd, got {self.scales}")
        if self.sample_size % self.factor:
            raise ValueError(f"sample_size must be a multiple of the compression factor {self.factor}, got {self.sample_size}")

    @property
    def factor(self) -> int:
        """Height and width of a picture, relative to those of its latents."""
        return int(2 ** (len(self.widths) - 1))


class RMSNorm2d(nn.Module):
    """Divides each position's channels by their root mean square, then scales and shifts them: (B, C, H, W) in and out."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the squares is taken in float32."""
        scale = torch.rsqrt(x.float().square().mean(dim=1, keepdim=True) + self.eps)
        return (x * scale).to(x.dtype) * self.weight[:, None, None] + self.bias[:, None, None]


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a norm beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = RMSNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        out: Tensor = x + self.norm(self.conv2(F.silu(self.conv1(x))))
        return out


class MultiscaleAttention(nn.Module):
    """Linear attention whose heads see the positions themselves and, in a further branch a scale, their neighbourhoods.

    The branches are depthwise convolutions of queries, keys and values together. As in the authors' code, head n takes channels
    [3 n d, 3 (n + 1) d) of each branch as its query, key and value, d = `head_dim`.
    """

    def __init__(self, channels: int, head_dim: int, scales: Iterable[int]) -> None:
        super().__init__()
        self.head_dim = head_dim
        wide = 3 * channels
        self.qkv = nn.Conv2d(channels, wide, 1, bias=False)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(wide, wide, scale, padding=scale // 2, groups=wide, bias=False),
                nn.Conv2d(wide, wide, 1, groups=wide // head_dim, bias=False),
            )
            for scale in scales
        )
        self.proj = nn.Conv2d(channels * (1 + len(self.aggreg)), channels, 1, bias=False)
        self.norm = RMSNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        qkv = self.qkv(x)
        branches = torch.cat([qkv, *(branch(qkv) for branch in self.aggreg)], dim=1)
        heads = branches.float().reshape(x.shape[0], -1, 3, self.head_dim, x.shape[2] * x.shape[3])  # those of all branches
        q, k, v = heads.unbind(2)
        out = relu_linear_attention(q, k, v).to(x.dtype)
        normed: Tensor = self.norm(self.proj(out.reshape(x.shape[0], -1, x.shape[2], x.shape[3])))
        return normed


class GLUMBConv(nn.Module):
    """Inverted residual convolution with a gate, then a norm: 1x1, SiLU, depthwise 3x3, gated linear unit, 1x1."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        hidden = ratio * channels
        self.inverted_conv = nn.Conv2d(channels, 2 * hidden, 1)
        self.depth_conv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.point_conv = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = RMSNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        value, gate = self.depth_conv(F.silu(self.inverted_conv(x))).chunk(2, dim=1)
        out: Tensor = self.norm(self.point_conv(value * F.silu(gate)))
        return out


class EfficientViTBlock(nn.Module):
    """Attention and gated convolution, each beside the identity."""

    def __init__(self, channels: int, config: DCAEConfig) -> None:
        super().__init__()
        self.attn = MultiscaleAttention(channels, config.head_dim, config.scales)
        self.conv = GLUMBConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        x = x + self.attn(x)
        out: Tensor = x + self.conv(x)
        return out


class Downsample(nn.Module):
    """A convolution with stride 2, beside a shortcut without weights: pixels go to channels, neighbouring ones of which are averaged.

    The shortcut, a pixel unshuffle and means over groups of g channels, is written as a depthwise convolution with constant weights:
    output channel n of the 4 / g that belong to an input channel has 1 / g at pixels [n g, (n + 1) g) of a square of four. It has the
    other convolution's size, stride and padding, so that no division of a dynamic size has to be proved exact.
    """

    shortcut: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        group = 4 * in_channels // out_channels
        means = torch.eye(4 // group, device="cpu").repeat_interleave(group, dim=1) / group  # (4 / g, 4)
        kernel = F.pad(means.view(-1, 1, 2, 2), (1, 0, 1, 0))  # (4 / g, 1, 3, 3); the first row and column meet the padding
        self.register_buffer("shortcut", kernel.repeat(in_channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / 2, W / 2)."""
        out: Tensor = self.conv(x) + F.conv2d(x, self.shortcut, stride=2, padding=1, groups=self.in_channels)
        return out


class Upsample(nn.Module):
    """Doubled pixels through a convolution, beside a shortcut without weights: repeated channels go to pixels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.repeats = 4 * out_channels // in_channels
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, 2 H, 2 W)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out + F.pixel_shuffle(_repeat_channels(x, self.repeats), 2)


def _repeat_channels(x: Tensor, repeats: int) -> Tensor:
    return x if repeats == 1 else x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _blocks(config: DCAEConfig, stage: int, depth: int) -> list[nn.Module]:
    width = config.widths[stage]
    attends = stage >= len(config.widths) - config.attention_stages
    return [EfficientViTBlock(width, config) if attends else ResBlock(width) for _ in range(depth)]


class Encoder(nn.Module):
    """A picture to its latents."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.group = widths[-1] // config.latent_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.stages = nn.ModuleList()
        for i, depth in enumerate(config.encoder_depths):
            down = [Downsample(widths[i], widths[i + 1])] if i + 1 < len(widths) else []
            self.stages.append(nn.Sequential(*_blocks(config, i, depth), *down))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, latent_channels, H / factor, W / factor)."""
        x = self.conv_in(x)
        for stage in self.stages:
            x = stage(x)
        shortcut = x.reshape(x.shape[0], -1, self.group, x.shape[2], x.shape[3]).mean(dim=2)
        out: Tensor = self.conv_out(x) + shortcut
        return out


class Decoder(nn.Module):
    """Latents to their picture. Its stages are numbered as the encoder's, and run from the last to the first."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.repeats = widths[-1] // config.latent_channels
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.stages = nn.ModuleList()
        for i, depth in enumerate(config.decoder_depths):
            up = [Upsample(widths[i + 1], widths[i])] if i + 1 < len(widths) else []
            self.stages.append(nn.Sequential(*up, *_blocks(config, i, depth)))
        self.norm_out = RMSNorm2d(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent_channels, h, w) to (B, in_channels, factor * h, factor * w)."""
        x = self.conv_in(z) + _repeat_channels(z, self.repeats)
        for stage in reversed(self.stages):
            x = stage(x)
        out: Tensor = self.conv_out(F.relu(self.norm_out(x)))
        return out


class DCAEEncode(nn.Module):
    """The half of a DC-AE that encodes, under the names of the whole: `encoder.…`."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)

    def forward(self, x: Tensor) -> Tensor:
        """A picture to its latents.

        Args:
            x: (B, in_channels, H, W), float32 in [-1, 1]; H and W are meant to be multiples of the compression factor.

        Returns:
            (B, latent_channels, H / factor, W / factor), float32, rounded up.
        """
        out: Tensor = self.encoder(x)
        return out


class DCAEDecode(nn.Module):
    """The half of a DC-AE that decodes, under the names of the whole: `decoder.…`."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)

    def forward(self, z: Tensor) -> Tensor:
        """Latents to their picture.

        Args:
            z: (B, latent_channels, h, w), float32.

        Returns:
            (B, in_channels, factor * h, factor * w), float32, about [-1, 1].
        """
        out: Tensor = self.decoder(z)
        return out


_DIFFUSERS_NAMES = (
    (r"\.(?:down|up)_blocks\.", ".stages."),
    (r"\.to_qkv_multiscale\.(\d+)\.proj_in\.", r".attn.aggreg.\1.0."),
    (r"\.to_qkv_multiscale\.(\d+)\.proj_out\.", r".attn.aggreg.\1.1."),
    (r"\.attn\.attn\.", ".attn."),
    (r"\.to_out\.", ".proj."),
    (r"\.attn\.norm_out\.", ".attn.norm."),
    (r"\.conv_out\.conv_inverted\.", ".conv.inverted_conv."),
    (r"\.conv_out\.conv_depth\.", ".conv.depth_conv."),
    (r"\.conv_out\.conv_point\.", ".conv.point_conv."),
    (r"\.conv_out\.norm\.", ".conv.norm."),
)
"""Patterns and what they become, one after the other. The block's gated convolution is called `conv_out` there, as is the last layer."""

_AUTHORS_NAMES = (
    (r"\.project_in\.conv\.", ".conv_in."),
    (r"^encoder\.project_out\.op_list\.0\.conv\.", "encoder.conv_out."),
    (r"^decoder\.project_out\.op_list\.0\.", "decoder.norm_out."),
    (r"^decoder\.project_out\.op_list\.2\.conv\.", "decoder.conv_out."),
    (r"\.op_list\.", "."),
    (r"\.context_module\.main\.proj\.norm\.", ".attn.norm."),
    (r"\.context_module\.main\.(qkv|proj)\.conv\.", r".attn.\1."),
    (r"\.context_module\.main\.aggreg\.", ".attn.aggreg."),
    (r"\.local_module\.main\.point_conv\.norm\.", ".conv.norm."),
    (r"\.local_module\.main\.(\w+)\.conv\.", r".conv.\1."),
    (r"\.main\.(conv[12])\.conv\.", r".\1."),
    (r"\.main\.conv2\.norm\.", ".norm."),
    (r"\.main\.conv\.conv\.", ".conv."),
)


def _renamed(key: str, patterns: Iterable[tuple[str, str]]) -> str:
    for pattern, name in patterns:
        key = re.sub(pattern, name, key)
    return key


def _layouts(config: DCAEConfig, half: str) -> tuple[StateDictLayout, ...]:
    """The layouts of whole checkpoints; of each, `half` ("encoder" or "decoder") is taken and the other one left.

    Any other key is passed through, and reported.
    """
    other = {"encoder": "decoder.", "decoder": "encoder."}[half]

    def kept(state: Mapping[str, Tensor]) -> list[str]:
        return [key for key in state if not key.startswith(other)]

    def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = {}
        for key in kept(state):
            attention, _, part = key.rpartition(".to_")
            if part in ("q.weight", "k.weight", "v.weight"):
                fuse(state, [f"{attention}.to_{x}.weight" for x in "qkv"], converted, _renamed(f"{attention}.qkv.weight", _DIFFUSERS_NAMES))
            else:
                converted[_renamed(key, _DIFFUSERS_NAMES)] = state[key]
        # Linear layers there, which are 1x1 convolutions here.
        linear = re.compile(r"\.attn\.(qkv|proj)\.weight$")
        return {key: value[:, :, None, None] if linear.search(key) else value for key, value in converted.items()}

    def from_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_renamed(key, _AUTHORS_NAMES): state[key] for key in kept(state)}

    depths = config.encoder_depths if half == "encoder" else config.decoder_depths
    scales = [list(config.scales) if i >= len(depths) - config.attention_stages else [] for i in range(len(depths))]
    # What shapes and keys already say (the kinds of blocks and samplers) is not compared.
    settings = {
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "attention_head_dim": config.head_dim,
        f"{half}_block_out_channels": list(config.widths),
        f"{half}_layers_per_block": list(depths),
        f"{half}_qkv_multiscales": scales,
    }
    if half == "decoder":
        settings |= {"decoder_act_fns": "silu", "decoder_norm_types": "rms_norm"}
    return (
        StateDictLayout("diffusers", lambda keys: any("_blocks." in key for key in keys), from_diffusers, settings),
        StateDictLayout("mit-han-lab/efficientvit", lambda keys: any(".op_list." in key for key in keys), from_authors),
        # Our own names, both halves in one file.
        StateDictLayout(
            "isthmus, encoder and decoder",
            lambda keys: {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= keys,
            lambda state: {key: state[key] for key in kept(state)},
        ),
    )


_SOURCE = (
    "Chen et al., Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models, arXiv:2410.10733; checked against diffusers"
)


@register_model(
    "dc-ae-encode-tiny",
    DCAEConfig(
        latent_channels=4,
        widths=(8, 16, 16),
        encoder_depths=(1, 1, 1),
        decoder_depths=(1, 1, 1),
        attention_stages=1,
        head_dim=8,
        sample_size=16,
    ),
    summary="DC-AE's encoder with 3 stages (4x compression), for trying",
)
@register_model(
    "dc-ae-encode-f32c32-sana",
    DCAEConfig(),
    summary="The encoder of SANA's DC-AE, 32x compression to 32 channels",
)
def dc_ae_encode(config: DCAEConfig) -> ModelSpec:
    """A DC-AE's encoder; weights may be a whole DC-AE's, in diffusers' or the authors' layout."""
    size, factor = config.sample_size, config.factor

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        shape = (sizes["batch"], config.in_channels, sizes["height"], sizes["width"])
        return {"x": torch.from_numpy(rng.uniform(-1, 1, shape).astype("float32"))}

    # Nothing in the graph asks for multiples of the factor; the row or column that a picture lacks is taken as zeros.
    spatial = SizeRange(max(factor, size // 2 // factor * factor), size, 2 * size)
    return ModelSpec(
        build=lambda: DCAEEncode(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "height": size, "width": size},
        dynamic={"x": {0: "batch", 2: "height", 3: "width"}},
        ranges={"batch": SizeRange(1, 2, 8), "height": spatial, "width": spatial},
        outputs=("latents",),
        source=_SOURCE,
        layouts=_layouts(config, "encoder"),
    )


@register_model(
    "dc-ae-decode-tiny",
    DCAEConfig(
        latent_channels=4,
        widths=(8, 16, 16),
        encoder_depths=(1, 1, 1),
        decoder_depths=(1, 1, 1),
        attention_stages=1,
        head_dim=8,
        sample_size=16,
    ),
    summary="DC-AE's decoder with 3 stages (4x compression), for trying",
)
@register_model(
    "dc-ae-decode-f32c32-sana",
    DCAEConfig(),
    summary="The decoder of SANA's DC-AE, 32x compression to 32 channels",
)
def dc_ae_decode(config: DCAEConfig) -> ModelSpec:
    """A DC-AE's decoder; weights may be a whole DC-AE's, in diffusers' or the authors' layout."""
    size = config.sample_size // config.factor

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        shape = (sizes["batch"], config.latent_channels, sizes["height"], sizes["width"])
        return {"z": torch.from_numpy(rng.standard_normal(shape, dtype="float32"))}

    spatial = SizeRange(max(1, size // 2), size, 2 * size)
    return ModelSpec(
        build=lambda: DCAEDecode(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "height": size, "width": size},
        dynamic={"z": {0: "batch", 2: "height", 3: "width"}},
        ranges={"batch": SizeRange(1, 2, 8), "height": spatial, "width": spatial},
        outputs=("image",),
        source=_SOURCE,
        layouts=_layouts(config, "decoder"),
    )
