"""Rectified flow as one graph: the velocity network and the whole sampling loop (Liu et al., arXiv:2209.03003).

From noise x_1 to data x_0 along dx/dt = v(x, t), t from 1 to 0 on an even grid, by Euler's method or Heun's (two evaluations a step, one in
the last). The grid, the scaling of time and the steps are those of `flow.RectifiedFlowSampler`, which runs the same loop on the host around
an exported model; its calls are unrolled here, so that the two give the same. (The paper lets t run from 0, noise, to 1, data, with a
velocity of the other sign.)

`rectified-flow-2d` has the network of the authors' notebooks for 2-D data, tanh layers of 100 over [x, t], with 100 Euler steps as there;
`rectified-flow-dit-s-2` has a class-conditional DiT-S/2 as its velocity (SiT, Ma et al., arXiv:2401.08740, is that network on this flow).
The paper draws by Euler's method and by an adaptive Runge-Kutta; Heun's is not in it, and any size has it by `--set method=heun`. Both are
checked against the flow matching schedulers of diffusers.

The survey's sketch has the training loss and the outline of reflow, which is training too, and draws no sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..exporter.sampling import LoopCall
from ..exporter.spec import ModelSpec, SizeRange, register_model
from .dit import DiT, DiTConfig
from .dynamics import TimeMLP
from .flow import TIME_SCALE, RectifiedFlowSampler


@dataclass(frozen=True)
class RectifiedFlowConfig:
    """Settings of a rectified flow of vectors.

    Attributes:
        features: D, width of a sample.
        hidden: Width inside the velocity network.
        depth: Its hidden layers.
        classes: Classes, or 0 for none.
        steps: Intervals of the grid.
        method: `euler` or `heun`.
    """

    features: int = 16
    hidden: int = 64
    depth: int = 2
    classes: int = 0
    steps: int = 8
    method: Literal["euler", "heun"] = "euler"

    def __post_init__(self) -> None:
        for name in ("features", "hidden", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.classes < 0:
            raise ValueError(f"classes must be at least 0, got {self.classes}")
        flow_calls(self.steps, self.method)


@dataclass(frozen=True)
class RectifiedFlowDiTConfig:
    """Settings of a rectified flow of latents with a DiT.

    Attributes:
        input_size: Height and width of the latents.
        patch_size: See `DiTConfig`, as the next five.
        in_channels: As there.
        hidden_size: As there.
        depth: As there.
        num_heads: As there.
        num_classes: As there.
        steps: Intervals of the grid.
        method: `euler` or `heun`.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    num_classes: int = 1000
    steps: int = 10
    method: Literal["euler", "heun"] = "euler"

    def __post_init__(self) -> None:
        self.dit()
        flow_calls(self.steps, self.method)

    def dit(self) -> DiTConfig:
        """The settings of the network."""
        return DiTConfig(
            input_size=self.input_size,
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            hidden_size=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            num_classes=self.num_classes,
            learn_sigma=False,
        )


def flow_calls(steps: int, method: Literal["euler", "heun"]) -> Sequence[LoopCall]:
    """The evaluations of a sampling loop, in order.

    Raises:
        ValueError: There is no such method, or no step.
    """
    return (
        RectifiedFlowSampler(shape=(1, 1, 1), labels=(0,), names=("",), null_label=0, guidance=1.0, steps=steps, method=method).loop().calls
    )


def integrate_calls(velocity: Callable[[Tensor, float], Tensor], x: Tensor, calls: Sequence[LoopCall]) -> Tensor:
    """Runs a sampling loop.

    Args:
        velocity: v(x, t), given t as models get it, in [0, 1000].
        x: The noise, of any shape.
        calls: See `LoopCall`; none of them adds noise.

    Returns:
        The sample, shaped like the noise.
    """
    base, before = x, None
    for call in calls:
        out = velocity(x, call.time)
        change = out + call.previous * before if call.previous and before is not None else out
        kept = base if call.keep == 1 else call.keep * base
        x = kept + call.change * change
        base, before = x if call.advances else base, out
    return x


class LabelledMLP(nn.Module):
    """A `TimeMLP` with tanh, whose first layer may also see a label: (B, D), a time and labels (B,) to (B, D)."""

    def __init__(self, features: int, hidden: int, depth: int, classes: int) -> None:
        super().__init__()
        self.net = TimeMLP(features, hidden, depth=depth)
        self.label = nn.Embedding(classes, hidden) if classes else None

    def forward(self, x: Tensor, t: float, y: Tensor | None) -> Tensor:
        """The network at one time for all rows."""
        h = self.net.state(x) + self.net.time(torch.full((1, 1), t, dtype=x.dtype))
        if self.label is not None and y is not None:
            h = h + self.label(y)
        out: Tensor = self.net.rest(h)
        return out


class RectifiedFlow(nn.Module):
    """Velocity network and sampling loop for vectors."""

    def __init__(self, config: RectifiedFlowConfig) -> None:
        super().__init__()
        self.calls = flow_calls(config.steps, config.method)
        self.velocity = LabelledMLP(config.features, config.hidden, config.depth, config.classes)

    def forward(self, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Noise (B, D), and labels (B,) int64 where there are classes, to samples (B, D)."""
        return integrate_calls(lambda x, t: self.velocity(x, t / TIME_SCALE, y), noise, self.calls)


class RectifiedFlowDiT(nn.Module):
    """Velocity DiT and sampling loop for latents."""

    def __init__(self, config: RectifiedFlowDiTConfig) -> None:
        super().__init__()
        self.calls = flow_calls(config.steps, config.method)
        self.velocity = DiT(config.dit())

    def forward(self, noise: Tensor, y: Tensor) -> Tensor:
        """Noise (B, C, H, W) and labels (B,) int64 to latents (B, C, H, W)."""
        return integrate_calls(lambda x, t: self.velocity(x, torch.full((1,), t, dtype=torch.float32), y), noise, self.calls)


def labelled_noise(
    shape: Sequence[int], classes: int, *, null: bool = False
) -> Callable[[np.random.Generator, Mapping[str, int]], dict[str, Tensor]]:
    """Example inputs of a sampler: `noise`, standard normal (B, *shape) float32, and labels `y` (B,) int64 where there are classes.

    Args:
        shape: Of one sample.
        classes: Number of classes, or 0.
        null: Whether label `classes` exists too, and is drawn.
    """

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        drawn = {"noise": torch.from_numpy(rng.standard_normal((sizes["batch"], *shape), dtype="float32"))}
        if classes:
            drawn["y"] = torch.from_numpy(rng.integers(0, classes, sizes["batch"], endpoint=null))
        return drawn

    return inputs


_SOURCE = "Liu, Gong & Liu, Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, arXiv:2209.03003"


@register_model(
    "rectified-flow-tiny",
    RectifiedFlowConfig(classes=10),
    summary="Rectified flow by class with 8 Euler steps in the graph, for trying",
)
@register_model(
    "rectified-flow-heun-tiny",
    RectifiedFlowConfig(classes=10, steps=4, method="heun"),
    summary="Rectified flow by class with 4 Heun steps in the graph, for trying",
)
@register_model(
    "rectified-flow-2d",
    RectifiedFlowConfig(features=2, hidden=100, steps=100),
    summary="Rectified flow of 2-D data, 10,702 parameters, 100 Euler steps in the graph",
)
def rectified_flow(config: RectifiedFlowConfig) -> ModelSpec:
    """A rectified flow of vectors."""
    return ModelSpec(
        build=lambda: RectifiedFlow(config).eval(),
        inputs=labelled_noise((config.features,), config.classes),
        sizes={"batch": 2},
        dynamic={name: {0: "batch"} for name in (("noise", "y") if config.classes else ("noise",))},
        ranges={"batch": SizeRange(1, 2, 64)},
        outputs=("sample",),
        source=_SOURCE,
    )


@register_model(
    "rectified-flow-dit-s-2",
    RectifiedFlowDiTConfig(),
    summary="Rectified flow of 32x32 latents with a DiT-S/2, 10 Euler steps in the graph",
)
def rectified_flow_dit(config: RectifiedFlowDiTConfig) -> ModelSpec:
    """A rectified flow of latents."""
    return ModelSpec(
        build=lambda: RectifiedFlowDiT(config).eval(),
        inputs=labelled_noise((config.in_channels, config.input_size, config.input_size), config.num_classes, null=True),
        sizes={"batch": 2},
        dynamic={"noise": {0: "batch"}, "y": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 16)},
        outputs=("sample",),
        source=_SOURCE + "; network: Peebles & Xie, arXiv:2212.09748, as in Ma et al., SiT, arXiv:2401.08740",
    )
