"""Neural ODEs: dy/dt = f(t, y) with a learned f, the solver inside the graph (Chen et al., arXiv:1806.07366).

Three forms share their weights:

- `neural-ode-…`: a fixed number of steps of the classical Runge-Kutta method of order 4 (`rk4`), or of Kutta's 3/8 rule (`rk4-38`, which
  torchdiffeq calls `rk4`), unrolled.
- `neural-ode-dopri5-…`: Dormand and Prince's method of order 5 with adaptive steps, as a loop (`torch.while_loop`, ONNX Loop).
- `neural-ode-dopri5-unrolled-…`: the same attempts one after the other without a loop, for targets that have none. A row that has arrived
  is left alone, so that the two give the same.

The adaptive solver, for each row by itself (what a row gives does not depend on the others in its batch; torchdiffeq has one step for the
whole batch, and equals this one row by row):

    k_1 = f(t, y) (known from the step before), k_2 ... k_7 as in `dynamics.TABLEAUS`, y' = y + h sum_i b_i k_i
    e = rms(h sum_i e_i k_i / (atol + rtol max(|y|, |y'|)))
    accepted when e <= 1, and then t' = t + h;  h' = h min(10, max(0.2, 0.9 e^-(1/5 - 3/4 beta) e_prev^beta))

with e_prev the error of the last accepted step, not below 1e-4, as in Hairer's DOPRI5; after a rejection h does not grow. beta = 0.04 is PI
control, beta = 0 torchdiffeq's control, in which h does not shrink after an accepted step. torchdiffeq's e_i are 2/3 of Dormand and
Prince's. The last step is cut so that it ends at t1 (torchdiffeq steps beyond and interpolates, unless `step_t` names t1). After
`max_steps` attempts, rejected ones included, a row that has not arrived keeps the state that it has: `finished` is false there, and
`y_end` is the state at an earlier time than t1.

`neural-ode-mnist` and `neural-ode-dopri5-mnist` are the paper's ODE-Net for MNIST, two strided convolutions, an ODE block of 64 channels on
6x6 and a linear layer, as in the authors' example (`examples/odenet_mnist.py` of torchdiffeq, whose state dict this is); the example has
208,266 parameters, the paper gives 0.22 M. Its time runs from 0 to 1 and its tolerance is 1e-3. The steps of the fixed form are inferred.

The survey's sketch calls torchdiffeq on the host; the trajectory it returns at several times is not an output here. Its "physics
constraints" are a method without a body.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, register_model
from .dynamics import TABLEAUS, Field, Method, TimeMLP, combine, grid, integrate, standard_normal

_SAFETY, _SMALLEST, _LARGEST, _ERROR_FLOOR = 0.9, 0.2, 10.0, 1e-4


@dataclass(frozen=True)
class NeuralODEConfig:
    """Settings of a neural ODE.

    Attributes:
        method: `rk4`, `rk4-38` (fixed steps), or `dopri5` (adaptive).
        steps: Number of steps of a fixed method.
        loop: Write the adaptive method as a loop; otherwise its attempts stand one after the other.
        max_steps: Attempts of the adaptive method, at most.
        rtol: Relative tolerance of the adaptive method.
        atol: Absolute tolerance of the adaptive method.
        first_step: The first step of the adaptive method.
        beta: Exponent of the last error in the step control; 0 leaves it out.
        t1: Where the time ends; it starts at 0.
        features: D, width of the state.
        hidden: Width inside the field.
        depth: Hidden layers of the field.
    """

    method: Literal["rk4", "rk4-38", "dopri5"] = "rk4"
    steps: int = 4
    loop: bool = True
    max_steps: int = 32
    rtol: float = 1e-3
    atol: float = 1e-3
    first_step: float = 0.25
    beta: float = 0.04
    t1: float = 1.0
    features: int = 8
    hidden: int = 32
    depth: int = 1

    def __post_init__(self) -> None:
        if self.method not in ("rk4", "rk4-38", "dopri5"):
            raise ValueError(f"method must be rk4, rk4-38 or dopri5, got {self.method!r}")
        for name in ("steps", "max_steps", "features", "hidden", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rtol", "atol", "first_step", "t1"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.beta < 0.2:
            raise ValueError(f"beta must be in [0, 0.2), got {self.beta}")


@dataclass(frozen=True)
class ODENetConfig:
    """Settings of the ODE-Net for MNIST.

    Attributes:
        channels: Channels of the state.
        method: See `NeuralODEConfig`, as all that follow.
        steps: As there.
        loop: As there.
        max_steps: As there.
        rtol: As there.
        atol: As there.
        first_step: As there.
        beta: As there.
        t1: As there.
    """

    channels: int = 64
    method: Literal["rk4", "rk4-38", "dopri5"] = "rk4"
    steps: int = 4
    loop: bool = True
    max_steps: int = 32
    rtol: float = 1e-3
    atol: float = 1e-3
    first_step: float = 0.25
    beta: float = 0.04
    t1: float = 1.0

    def __post_init__(self) -> None:
        if self.channels < 1 or self.channels % min(32, self.channels):
            raise ValueError(f"channels must be at least 1 and a multiple of its {min(32, self.channels)} groups, got {self.channels}")
        self.solver()

    def solver(self) -> NeuralODEConfig:
        """The settings of the solver."""
        return NeuralODEConfig(
            method=self.method,
            steps=self.steps,
            loop=self.loop,
            max_steps=self.max_steps,
            rtol=self.rtol,
            atol=self.atol,
            first_step=self.first_step,
            beta=self.beta,
            t1=self.t1,
        )


def solve_fixed(field: Field, y: Tensor, config: NeuralODEConfig) -> Tensor:
    """The state at t1, (B, D), from that at 0, by a fixed method."""
    return integrate(field, TABLEAUS[config.method], y, grid(0.0, config.t1, config.steps))


State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""What the adaptive solver carries: go, attempts left (both int64 of rank 0), t, h, the last error (all (B, 1)), y, f(t, y) (both (B, D)),
and the number of accepted steps (B, 1), int64."""


def attempt(field: Field, method: Method, state: State, config: NeuralODEConfig) -> State:
    """One attempted step of the adaptive solver; rows that have arrived stay as they are."""
    _, left, t, h, before, y, slope, count = state
    assert method.error is not None
    rest = config.t1 - t
    active = rest > 0
    last = h >= rest
    step = torch.where(last, rest, h)
    slopes = method.stages(field, t, y, step, first=slope)
    ahead = y + step * combine(method.b, slopes)
    arrival = torch.where(last, torch.full_like(t, config.t1), t + step)
    slopes.append(field(arrival, ahead))
    scale = config.atol + config.rtol * torch.maximum(y.abs(), ahead.abs())
    # The step is inside the sum, and the sum of some 1e-3 inside the quotient, so that nothing is small before it is divided.
    error = torch.sqrt(((step * combine(method.error, slopes)) / scale).square().mean(dim=1, keepdim=True))
    accepted = error <= 1
    # In logarithms, because of what the powers of a very small error would be.
    bounded = torch.clamp(error, min=1e-8)
    change = -(0.2 - 0.75 * config.beta) * torch.log(bounded)
    if config.beta:
        change = change + config.beta * torch.log(before)
    factor = torch.clamp(_SAFETY * torch.exp(change), min=_SMALLEST, max=_LARGEST)
    grown = factor if config.beta else torch.clamp(factor, min=1.0)
    factor = torch.where(accepted, grown, torch.clamp(factor, max=1.0))
    moved = active & accepted
    t = torch.where(moved, arrival, t)
    left = left - 1
    arrived = (t < config.t1).to(torch.int64).amax(dim=(0, 1))
    return (
        torch.minimum(left, arrived),
        left,
        t,
        torch.where(active, step * factor, h),
        torch.where(moved, torch.clamp(error, min=_ERROR_FLOOR), before),
        torch.where(moved, ahead, y),
        torch.where(moved, slopes[-1], slope),
        count + moved.to(torch.int64),
    )


def solve_adaptive(field: Field, y: Tensor, config: NeuralODEConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The state at t1 by the adaptive method.

    Args:
        field: f(t, y).
        y: The state at 0, (B, D).
        config: The settings.

    Returns:
        The state (B, D), the number of accepted steps (B,) int64, and whether t1 was reached (B,) bool.
    """
    method = Method(TABLEAUS["dopri5"], y)
    t = y.new_zeros((y.shape[0], 1))
    state: State = (
        torch.tensor(1),
        torch.tensor(config.max_steps),
        t,
        torch.full_like(t, config.first_step),
        torch.full_like(t, _ERROR_FLOOR),
        y,
        field(t, y),
        torch.zeros_like(t, dtype=torch.int64),
    )

    def again(go: Tensor, *_: Tensor) -> Tensor:
        return go > 0

    def once(*carried: Tensor) -> State:
        return attempt(field, method, carried, config)  # type: ignore[arg-type]  # of a method with an error

    if not config.loop:
        for _ in range(config.max_steps):
            state = once(*state)
    elif torch.compiler.is_compiling():
        state = torch.while_loop(again, once, state)  # type: ignore[no-untyped-call]  # untyped
    else:  # the same, without having torch compile it
        while again(*state):
            state = once(*state)
    _, _, t, _, _, y, _, count = state
    return y, count.squeeze(1), (t >= config.t1).squeeze(1)


class NeuralODE(nn.Module):
    """Integrates a learned field from 0 to t1.

    Args:
        config: The settings.
        field: f(t, y), a module; a `TimeMLP` when None.
    """

    def __init__(self, config: NeuralODEConfig, field: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.field = TimeMLP(config.features, config.hidden, depth=config.depth) if field is None else field

    def forward(self, y: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """From the state (B, D) at 0 to that at t1; with `dopri5` also the steps (B,) int64 and whether t1 was reached (B,) bool."""
        if self.config.method == "dopri5":
            return solve_adaptive(self.field, y, self.config)
        return solve_fixed(self.field, y, self.config)


class ConcatConv2d(nn.Module):
    """A 3x3 convolution over the channels and the time as a first channel; the name of its weights is the authors'."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._layer = nn.Conv2d(channels + 1, channels, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """(B, C, H, W) and times (1, 1) or (B, 1) to (B, C, H, W)."""
        plane = t[:, :, None, None].expand(x.shape[0], 1, x.shape[2], x.shape[3])
        out: Tensor = self._layer(torch.cat([plane, x], dim=1))
        return out


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels)


class ConvField(nn.Module):
    """The field of the ODE block: norm, ReLU, convolution, twice, and a norm."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.shape = (-1, channels, size, size)
        self.norm1 = _norm(channels)
        self.conv1 = ConcatConv2d(channels)
        self.norm2 = _norm(channels)
        self.conv2 = ConcatConv2d(channels)
        self.norm3 = _norm(channels)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """States of C x size x size in one row each, (B, D), to slopes (B, D)."""
        x = self.conv1(t, F.relu(self.norm1(y.reshape(self.shape))))
        x = self.norm3(self.conv2(t, F.relu(self.norm2(x))))
        return x.flatten(1)  # type: ignore[no-any-return]  # untyped


class ODEBlock(nn.Module):
    """The ODE block; see `ConvField`."""

    def __init__(self, config: ODENetConfig, size: int) -> None:
        super().__init__()
        self.odefunc = ConvField(config.channels, size)
        self.solver = config.solver()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) to the same at t1, and what the adaptive solver says besides."""
        y = x.flatten(1)
        if self.solver.method == "dopri5":
            y, *others = solve_adaptive(self.odefunc, y, self.solver)
            return (y.reshape(self.odefunc.shape), *others)
        return (solve_fixed(self.odefunc, y, self.solver).reshape(self.odefunc.shape),)


class ODENet(nn.Module):
    """Convolutions, the ODE block, and a classifier: pictures (B, 1, 28, 28) to logits (B, 10)."""

    def __init__(self, config: ODENetConfig) -> None:
        super().__init__()
        c = config.channels
        self.downsampling_layers = nn.Sequential(
            nn.Conv2d(1, c, 3), _norm(c), nn.ReLU(), nn.Conv2d(c, c, 4, 2, 1), _norm(c), nn.ReLU(), nn.Conv2d(c, c, 4, 2, 1)
        )
        self.feature_layers = nn.ModuleList([ODEBlock(config, size=6)])
        self.fc_layers = nn.Sequential(_norm(c), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(c, 10))

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Pictures (B, 1, 28, 28) to logits (B, 10); with `dopri5` also the steps (B,) int64 and whether t1 was reached (B,) bool."""
        state, *others = self.feature_layers[0](self.downsampling_layers(image))
        logits = self.fc_layers(state)
        return (logits, *others) if others else logits


@register_model(
    "neural-ode-tiny",
    NeuralODEConfig(),
    summary="Neural ODE with 4 steps of Runge-Kutta, for trying",
)
@register_model(
    "neural-ode-dopri5-tiny",
    NeuralODEConfig(method="dopri5", t1=2.0, first_step=0.5),
    summary="Neural ODE with adaptive dopri5 as a loop of at most 32 attempts, for trying",
)
@register_model(
    "neural-ode-dopri5-unrolled-tiny",
    NeuralODEConfig(method="dopri5", loop=False, max_steps=3, t1=2.0, first_step=0.5),
    summary="Neural ODE with adaptive dopri5 as 3 attempts without a loop, for trying",
)
def neural_ode(config: NeuralODEConfig) -> ModelSpec:
    """A neural ODE of a vector."""
    return ModelSpec(
        build=lambda: NeuralODE(config).eval(),
        inputs=standard_normal("y", ("batch", config.features)),
        sizes={"batch": 2},
        dynamic={"y": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 64)},
        outputs=("y_end", "steps", "finished") if config.method == "dopri5" else ("y_end",),
        source="Chen et al., Neural Ordinary Differential Equations, arXiv:1806.07366; dopri5: Hairer, Norsett & Wanner, section II.4",
    )


@register_model("neural-ode-mnist", ODENetConfig(), summary="The ODE-Net for MNIST, 0.21 M parameters, 4 steps of Runge-Kutta")
@register_model(
    "neural-ode-dopri5-mnist",
    ODENetConfig(method="dopri5"),
    summary="The ODE-Net for MNIST, 0.21 M parameters, adaptive dopri5 as a loop",
)
def ode_net(config: ODENetConfig) -> ModelSpec:
    """The ODE-Net for MNIST."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"image": torch.from_numpy(rng.random((sizes["batch"], 1, 28, 28), dtype="float32"))}

    return ModelSpec(
        build=lambda: ODENet(config).eval(),
        inputs=inputs,
        sizes={"batch": 2},
        dynamic={"image": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 64)},
        fixed={"image": {2: "the ODE block is built for 6x6", 3: "the ODE block is built for 6x6"}},
        outputs=("logits", "steps", "finished") if config.method == "dopri5" else ("logits",),
        source="Chen et al., Neural Ordinary Differential Equations, arXiv:1806.07366; torchdiffeq's examples/odenet_mnist.py",
    )
