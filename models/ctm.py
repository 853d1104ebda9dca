"""Consistency trajectory models: from any point of a trajectory to any later one (Kim et al., arXiv:2310.02279).

    G(x, t, s) = s / t x + (1 - s / t) g(x, t, s)                                  (equation 4)
    g(x, t, s) = c_skip(t) x + c_out(t) F(x / sqrt(t^2 + d^2), 250 ln t, 250 ln s)
    c_skip = d^2 / (t^2 + d^2),   c_out = d t / sqrt(t^2 + d^2)

for times t >= s, which are the noise's standard deviations, and d = 0.5. G(x, t, 0) = g(x, t, 0) is a consistency model; in the limit
s = t, g(x, t, t) is the denoiser, and the score is (g(x, t, t) - x) / t^2. So one network serves two modes, which are two forms here:

- *trajectory*: G(x, t, s);
- *score*: (g(x, t, t) - x) / t^2.

F is the authors' network (sony/ctm, code/cm/unet.py): the U-Net of `models/consistency.py`, which has in each residual block a projection
of the embedding of s beside the one of t and class, SiLU and linear layer each, and adds the two. `ctm-imagenet64` has the settings of
their ImageNet-64 model, and weights may have the names of their code.

The logarithm of s is bounded at the smallest noise, 0.002: the authors' code adds 1e-44, which half precision drops. The survey's sketch
has a network for each mode and gives neither the target time nor the mixture with x; its "progressive generation" is no part of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, register_model
from .consistency import SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, UNet, authors_layout, check_unet


@dataclass(frozen=True)
class CTMConfig:
    """Settings of a consistency trajectory model.

    Attributes:
        sample_size: Height and width of a picture.
        in_channels: Its channels.
        widths: Channels at each resolution; multiples of `norm_groups`, and of `head_dim` where there is attention.
        layers: Residual blocks at each resolution on the way down; there is one more on the way up.
        attention: Whether there is attention, by resolution.
        head_dim: Channels of an attention head.
        norm_groups: Groups of the group norms.
        num_classes: Number of classes.
        mode: "trajectory" or "score".
    """

    sample_size: int = 64
    in_channels: int = 3
    widths: tuple[int, ...] = (192, 384, 576, 768)
    layers: int = 3
    attention: tuple[bool, ...] = (False, True, True, True)
    head_dim: int = 64
    norm_groups: int = 32
    num_classes: int = 1000
    mode: str = "trajectory"

    def __post_init__(self) -> None:
        check_unet(self)
        if self.mode not in ("trajectory", "score"):
            raise ValueError(f"mode must be 'trajectory' or 'score', got {self.mode!r}")


class TrajectoryModel(nn.Module):
    """The trajectory mode."""

    def __init__(self, config: CTMConfig) -> None:
        super().__init__()
        self.unet = UNet(config, further=True)

    def denoise(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        """g(x, t, s) for the classes y."""
        time = t[:, None, None, None]
        root = torch.sqrt(time * time + SIGMA_DATA**2)
        network = self.unet(x / root, 250 * torch.log(t), y, 250 * torch.log(s.clamp(min=SIGMA_MIN)))
        out: Tensor = (SIGMA_DATA / root) ** 2 * x + SIGMA_DATA * time / root * network
        return out

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        """Where the trajectory through x is at time s.

        Args:
            x: Noisy pictures (B, in_channels, sample_size, sample_size), float32.
            t: Their times (B,), float32 in [0.002, 80].
            s: The times to go to (B,), float32 in [0, t].
            y: Classes (B,), int64.

        Returns:
            As `x`.
        """
        share = (s / t)[:, None, None, None]
        return share * x + (1 - share) * self.denoise(x, t, s, y)


class ScoreModel(TrajectoryModel):
    """The score mode."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # the other form
        """The score, the gradient of the log density of pictures with this noise; arguments and result as in the other mode."""
        return (self.denoise(x, t, t, y) - x) / (t * t)[:, None, None, None]


@register_model(
    "ctm-tiny",
    CTMConfig(sample_size=8, widths=(16, 32), layers=1, attention=(False, True), head_dim=16, norm_groups=8, num_classes=10),
    summary="Consistency trajectory model with two resolutions, from t to s, for trying",
)
@register_model(
    "ctm-score-tiny",
    CTMConfig(sample_size=8, widths=(16, 32), layers=1, attention=(False, True), head_dim=16, norm_groups=8, num_classes=10, mode="score"),
    summary="The score of ctm-tiny",
)
@register_model("ctm-imagenet64", CTMConfig(), summary="Consistency trajectory model of ImageNet-64, 324 M parameters")
@register_model("ctm-score-imagenet64", CTMConfig(mode="score"), summary="The score of ctm-imagenet64")
def ctm(config: CTMConfig) -> ModelSpec:
    """A consistency trajectory model in one of its modes; weights may come in the authors' layout."""
    score = config.mode == "score"

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = sizes["batch"]
        # The score has a scale of 1 / t: times of one decade, so that no row of a batch hides another.
        low, high = (0.2, 2.0) if score else (0.02, SIGMA_MAX)
        t = np.exp(rng.uniform(np.log(low), np.log(high), batch)).astype(np.float32)
        x = (
            rng.standard_normal((batch, config.in_channels, config.sample_size, config.sample_size))
            * np.sqrt(t**2 + SIGMA_DATA**2)[:, None, None, None]
        )
        drawn = {"x": x.astype(np.float32), "t": t, "s": (t * rng.uniform(0, 1, batch)).astype(np.float32)}
        drawn["y"] = rng.integers(0, config.num_classes, batch)
        return {name: torch.from_numpy(value) for name, value in drawn.items() if name != "s" or not score}

    fixed = f"attention and resampling are laid out for {config.sample_size}x{config.sample_size}; --set sample_size=N for another size"
    return ModelSpec(
        build=lambda: (ScoreModel if score else TrajectoryModel)(config).eval(),
        inputs=inputs,
        sizes={"batch": 2},
        dynamic={name: {0: "batch"} for name in (("x", "t", "y") if score else ("x", "t", "s", "y"))},
        ranges={"batch": SizeRange(1, 2, 16)},
        fixed={"x": {2: fixed, 3: fixed}},
        outputs=("score" if score else "sample",),
        source="Kim et al., Consistency Trajectory Models, arXiv:2310.02279; network: github.com/sony/ctm, code/cm/unet.py",
        layouts=(authors_layout(config, "sony/ctm"),),
    )
