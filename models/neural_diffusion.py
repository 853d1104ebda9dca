"""Neural stochastic differential equations: dx = mu(t, x) dt + sigma(t, x) dW with learned mu and sigma, the solver inside the graph.

Euler-Maruyama over a fixed grid, with the standard normal numbers z_k of every step as an input, so that a run can be repeated anywhere:

    x_{k+1} = x_k + mu(t_k, x_k) h + sigma(t_k, x_k) sqrt(h) z_k

In the sense of Ito, of strong order 1/2. `noise_size` 0 means diagonal noise: sigma is a vector, made positive by a softplus. Otherwise
sigma is a matrix of D x `noise_size`, of either sign, as in Kidger et al. (arXiv:2102.03657).

The survey's `NeuralDiffusionModel` returns drift and diffusion and integrates nothing; this is the whole model around it (neural SDEs: Tzen
and Raginsky, arXiv:1905.09883; Li et al., arXiv:2001.01328). The Neural Diffusion Models of Bartosh et al. (arXiv:2310.08337), whose
figures the survey quotes beside its sketch, are another thing: a diffusion model whose forward process has a learned, non-linear mean.

`neural-diffusion-sde-gan` has the sizes of the generator in `examples/sde_gan.py` of torchsde, the code of Kidger et al.: initial noise of
5 through an MLP to a hidden state of 16, 3 noises, an affine readout at 64 times; its activation is LipSwish, 0.909 x sigmoid(x), and a
tanh ends each MLP of the equation. That code integrates in the sense of Stratonovich with the reversible Heun method; here as above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, register_model
from .dynamics import TimeMLP


@dataclass(frozen=True)
class NeuralDiffusionConfig:
    """Settings of a neural SDE.

    Attributes:
        features: D, width of the state.
        hidden: Width inside the networks of drift and diffusion, which have one hidden layer.
        noise_size: Number of Brownian motions; 0 for one on each feature of the state.
        initial_size: Width of the initial noise, which an MLP maps to the first state; 0 when the first state is the input.
        readout: Channels that are read from the state at each time; 0 when the state is the output.
        bounded: A tanh after the networks of drift and diffusion.
        steps: Number of steps.
        t1: Where the time ends; it starts at 0.
    """

    features: int = 8
    hidden: int = 32
    noise_size: int = 0
    initial_size: int = 0
    readout: int = 0
    bounded: bool = False
    steps: int = 8
    t1: float = 1.0

    def __post_init__(self) -> None:
        for name in ("features", "hidden", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("noise_size", "initial_size", "readout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.t1 <= 0:
            raise ValueError(f"t1 must be above 0, got {self.t1}")


class LipSwish(nn.Module):
    """0.909 x sigmoid(x), whose slope is at most 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return 0.909 * F.silu(x)


class NeuralDiffusion(nn.Module):
    """Integrates a learned SDE.

    Args:
        config: The settings.
        drift: mu(t, x), (B, D); a `TimeMLP` when None.
        diffusion: What sigma(t, x) is made of, (B, D) or (B, D * noise_size); a `TimeMLP` when None.
    """

    def __init__(self, config: NeuralDiffusionConfig, drift: nn.Module | None = None, diffusion: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        d, hidden = config.features, config.hidden
        activation: type[nn.Module] = LipSwish if config.bounded else nn.Tanh
        self.initial = (
            nn.Sequential(nn.Linear(config.initial_size, hidden), LipSwish(), nn.Linear(hidden, d)) if config.initial_size else None
        )
        self.drift = TimeMLP(d, hidden, depth=1, activation=activation) if drift is None else drift
        width = d * max(1, config.noise_size)
        self.diffusion = TimeMLP(d, hidden, width, depth=1, activation=activation) if diffusion is None else diffusion
        self.readout = nn.Linear(d, config.readout) if config.readout else None

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Integrates from 0 to t1.

        Args:
            x: The first state (B, D), or the initial noise (B, initial_size).
            noise: Standard normal, (B, steps, D) or (B, steps, noise_size).

        Returns:
            The last state (B, D), and the states, or what is read from them, at all times (B, steps + 1, D or readout).
        """
        config = self.config
        if self.initial is not None:
            x = self.initial(x)
        h = config.t1 / config.steps
        path = [x]
        for k in range(config.steps):
            t = torch.full((1, 1), k * h, dtype=x.dtype)
            mu, sigma, dw = self.drift(t, x), self.diffusion(t, x), noise[:, k] * math.sqrt(h)
            if config.bounded:
                mu, sigma = torch.tanh(mu), torch.tanh(sigma)
            if config.noise_size:
                change = torch.matmul(sigma.reshape(-1, config.features, config.noise_size), dw.unsqueeze(2)).squeeze(2)
            else:
                change = F.softplus(sigma) * dw
            x = x + mu * h + change
            path.append(x)
        states = torch.stack(path, dim=1)
        return x, states if self.readout is None else self.readout(states)


@register_model("neural-diffusion-tiny", NeuralDiffusionConfig(), summary="Neural SDE with 8 steps of Euler-Maruyama, for trying")
@register_model(
    "neural-diffusion-sde-gan",
    NeuralDiffusionConfig(features=16, hidden=16, noise_size=3, initial_size=5, readout=1, bounded=True, steps=63, t1=63.0),
    summary="The generator of an SDE-GAN, 2049 parameters, 63 steps",
)
def neural_diffusion(config: NeuralDiffusionConfig) -> ModelSpec:
    """A neural SDE."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = sizes["batch"]
        shapes = {
            "x": (batch, config.initial_size or config.features),
            "noise": (batch, config.steps, config.noise_size or config.features),
        }
        return {name: torch.from_numpy(rng.standard_normal(shape, dtype="float32")) for name, shape in shapes.items()}

    return ModelSpec(
        build=lambda: NeuralDiffusion(config).eval(),
        inputs=inputs,
        sizes={"batch": 2},
        dynamic={"x": {0: "batch"}, "noise": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 64)},
        fixed={"noise": {1: "the steps are unrolled; --set steps=N builds another"}},
        outputs=("x_end", "path"),
        source="Tzen & Raginsky, Neural Stochastic Differential Equations, arXiv:1905.09883; Kidger et al., Neural SDEs as "
        "Infinite-Dimensional GANs, arXiv:2102.03657",
    )
