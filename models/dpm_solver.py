"""DPM-Solver++ as one graph: the network and the whole solver (Lu et al., arXiv:2206.00927, arXiv:2211.01095).

For a diffusion x_t = alpha_t x_0 + sigma_t noise with half log-SNR lambda = log(alpha / sigma), the multistep solver of second order in
data prediction, DPM-Solver++(2M), goes from t_{i-1} to t_i by

    h_i = lambda_i - lambda_{i-1},   r = h_{i-1} / h_i,   D = (1 + 1 / (2 r)) x0_{i-1} - 1 / (2 r) x0_{i-2}
    x_i = (sigma_i / sigma_{i-1}) x_{i-1} - alpha_i (exp(-h_i) - 1) D

where x0_i is the data predicted at t_i, directly or from predicted noise, (x - sigma eps) / alpha. The first step is of first order, D =
x0_0, which is DDIM, and so is the last when there are fewer than 15 (`lower_order_final`, as in the authors' code). The schedule is the
linear VP one, log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2 with b0 = 0.1, b1 = 20, from t = 1 to 1e-3, on a grid that is even in lambda
(`logsnr`) or in t (`time`). One evaluation of the network a step; all numbers of the schedule are constants of the graph.

Networks get t in [0, 1] (`dpm-solver-tiny`), or (t - 1/1000) 1000 as those trained on 1000 steps do (`dpm-solver-dit-s-2`, a
class-conditional DiT-S/2 predicting noise). 10 steps are the paper's headline setting.

The survey names the solver and its 10 steps, and has no code of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, register_model
from .dit import DiT, DiTConfig
from .rectified_flow import LabelledMLP, labelled_noise


class Level(NamedTuple):
    """A point of the schedule: x_t = alpha x_0 + sigma noise.

    Attributes:
        time: t in [0, 1].
        alpha: See above.
        sigma: See above; 0 only at the last point.
    """

    time: float
    alpha: float
    sigma: float


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Settings of the solver.

    Attributes:
        steps: Number of steps.
        order: 1 (DDIM) or 2.
        grid: `logsnr` or `time`.
        predicts: What the network predicts: `data` or `noise`.
        lower_order_final: The last of fewer than 15 steps is of first order.
        beta_start: b0.
        beta_end: b1.
        t_end: Where the time ends.
    """

    steps: int = 10
    order: int = 2
    grid: Literal["logsnr", "time"] = "logsnr"
    predicts: Literal["data", "noise"] = "data"
    lower_order_final: bool = True
    beta_start: float = 0.1
    beta_end: float = 20.0
    t_end: float = 1e-3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order}")
        if self.grid not in ("logsnr", "time"):
            raise ValueError(f"grid must be logsnr or time, got {self.grid!r}")
        if self.predicts not in ("data", "noise"):
            raise ValueError(f"predicts must be data or noise, got {self.predicts!r}")
        if not 0 < self.beta_start < self.beta_end:
            raise ValueError(f"beta_start must be above 0 and below beta_end, got {self.beta_start} and {self.beta_end}")
        if not 0 < self.t_end < 1:
            raise ValueError(f"t_end must be in (0, 1), got {self.t_end}")

    def level(self, t: float) -> Level:
        """The schedule at t."""
        log_alpha = -(t**2) * (self.beta_end - self.beta_start) / 4 - t * self.beta_start / 2
        return Level(t, math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)))

    def time(self, half_log_snr: float) -> float:
        """The t of a lambda."""
        rise = self.beta_end - self.beta_start
        twice = 2 * rise * math.log1p(math.exp(-2 * half_log_snr))
        return twice / (math.sqrt(self.beta_start**2 + twice) + self.beta_start) / rise

    def levels(self) -> list[Level]:
        """The grid, `steps` + 1 points from t = 1."""
        parts = [i / self.steps for i in range(self.steps + 1)]
        if self.grid == "time":
            return [self.level(1 + part * (self.t_end - 1)) for part in parts]
        first, last = (_half_log_snr(self.level(t)) for t in (1.0, self.t_end))
        inner = [self.level(self.time(first + part * (last - first))) for part in parts[1:-1]]
        return [self.level(1.0), *inner, self.level(self.t_end)]


@dataclass(frozen=True)
class DPMSolverConfig(Solver):
    """Settings of a sampler of vectors; those of the solver are in `Solver`.

    Attributes:
        features: D, width of a sample.
        hidden: Width inside the network.
        depth: Its hidden layers.
        classes: Classes, or 0 for none.
    """

    features: int = 16
    hidden: int = 64
    depth: int = 2
    classes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("features", "hidden", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.classes < 0:
            raise ValueError(f"classes must be at least 0, got {self.classes}")


@dataclass(frozen=True)
class DPMSolverDiTConfig(Solver):
    """Settings of a sampler of latents with a DiT; those of the solver are in `Solver`.

    Attributes:
        input_size: See `DiTConfig`, as all that follow.
        patch_size: As there.
        in_channels: As there.
        hidden_size: As there.
        depth: As there.
        num_heads: As there.
        num_classes: As there.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    num_classes: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dit()

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


def _half_log_snr(level: Level) -> float:
    return math.log(level.alpha) - math.log(level.sigma) if level.sigma else math.inf


def solve(
    network: Callable[[Tensor, Level], Tensor],
    x: Tensor,
    levels: Sequence[Level],
    *,
    order: int = 2,
    predicts: Literal["data", "noise"] = "data",
    lower_order_final: bool = True,
) -> Tensor:
    """Runs the solver.

    Args:
        network: What is predicted at x, given a level.
        x: The noise, of any shape.
        levels: The grid, from the noisiest on.
        order: See `Solver`, as the others.
        predicts: As there.
        lower_order_final: As there.

    Returns:
        The sample, shaped like the noise.
    """
    steps, before, last_h = len(levels) - 1, None, 0.0
    for i, (now, after) in enumerate(itertools.pairwise(levels)):
        out = network(x, now)
        data = out if predicts == "data" else (x - now.sigma * out) * (1 / now.alpha)
        h = _half_log_snr(after) - _half_log_snr(now)
        first = order == 1 or before is None or after.sigma == 0 or (lower_order_final and i == steps - 1 and steps < 15)
        if first or before is None:
            estimate = data
        else:
            weight = h / (2 * last_h)
            estimate = (1 + weight) * data - weight * before
        # A step to sigma = 0 has h = inf, and gives alpha times the estimate.
        x = (after.sigma / now.sigma) * x - (after.alpha * math.expm1(-h)) * estimate
        before, last_h = data, h
    return x


class DPMSolver(nn.Module):
    """Network and solver for vectors."""

    def __init__(self, config: DPMSolverConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = config.levels()
        self.network = LabelledMLP(config.features, config.hidden, config.depth, config.classes)

    def forward(self, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Noise (B, D), and labels (B,) int64 where there are classes, to samples (B, D)."""
        c = self.config
        return solve(
            lambda x, level: self.network(x, level.time, y),
            noise,
            self.levels,
            order=c.order,
            predicts=c.predicts,
            lower_order_final=c.lower_order_final,
        )


class DPMSolverDiT(nn.Module):
    """DiT and solver for latents."""

    def __init__(self, config: DPMSolverDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = config.levels()
        self.network = DiT(config.dit())

    def forward(self, noise: Tensor, y: Tensor) -> Tensor:
        """Noise (B, C, H, W) and labels (B,) int64 to latents (B, C, H, W)."""
        c = self.config
        return solve(
            lambda x, level: self.network(x, torch.full((1,), level.time * 1000 - 1, dtype=torch.float32), y),
            noise,
            self.levels,
            order=c.order,
            predicts=c.predicts,
            lower_order_final=c.lower_order_final,
        )


_SOURCE = "Lu et al., DPM-Solver, arXiv:2206.00927, and DPM-Solver++, arXiv:2211.01095; the authors' code, LuChengTHU/dpm-solver"


@register_model(
    "dpm-solver-tiny",
    DPMSolverConfig(classes=10),
    summary="DPM-Solver++(2M) by class with 10 steps in the graph, for trying",
)
def dpm_solver(config: DPMSolverConfig) -> ModelSpec:
    """A sampler of vectors."""
    return ModelSpec(
        build=lambda: DPMSolver(config).eval(),
        inputs=labelled_noise((config.features,), config.classes),
        sizes={"batch": 2},
        dynamic={name: {0: "batch"} for name in (("noise", "y") if config.classes else ("noise",))},
        ranges={"batch": SizeRange(1, 2, 64)},
        outputs=("sample",),
        source=_SOURCE,
    )


@register_model(
    "dpm-solver-dit-s-2",
    DPMSolverDiTConfig(predicts="noise"),
    summary="DPM-Solver++(2M) for 32x32 latents with a DiT-S/2, 10 steps in the graph",
)
def dpm_solver_dit(config: DPMSolverDiTConfig) -> ModelSpec:
    """A sampler of latents."""
    return ModelSpec(
        build=lambda: DPMSolverDiT(config).eval(),
        inputs=labelled_noise((config.in_channels, config.input_size, config.input_size), config.num_classes, null=True),
        sizes={"batch": 2},
        dynamic={"noise": {0: "batch"}, "y": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 16)},
        outputs=("sample",),
        source=_SOURCE + "; network: Peebles & Xie, arXiv:2212.09748",
    )
