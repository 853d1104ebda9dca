"""Diffusion Schroedinger bridge: sampling with learned drifts, and the iteration that finds them (De Bortoli et al., arXiv:2106.01357).

A bridge joins a data distribution at k = 0 to a prior at k = N by a pair of Markov chains, one forward and one backward, each with Gaussian
steps of variance 2 gamma_k around a network's mean:

    forward:   x_{k+1} = x_k + f(x_k, k) + sqrt(2 gamma_k) z_k           k = 0 ... N - 1
    backward:  x_{N-k-1} = x_{N-k} + b(x_{N-k}, k) + sqrt(2 gamma_{N-k-1}) z_k,   and no noise in the last step

as in the authors' code (`mean_match: False`), whose networks count the steps that they have made. `schrodinger-bridge-…` is the backward
chain, from the prior to data, and `schrodinger-bridge-forward-…` the forward one; both hold both networks, and noise is an input.

`schrodinger-bridge-2d` has the networks, the 20 steps and gamma = 0.01 of the authors' 2-D experiments; the keys of `forwards` and
`backwards` are those of their `ScoreNetwork`. What `iterative_proportional_fitting` finds between Gaussians is checked against torchcfm.

The networks are trained in turns (iterative proportional fitting: each is fitted to the reversal of the other's chain). That is training,
and stays out of the graph: `iterative_proportional_fitting` runs it on the host with any regression. Its sketch in the survey calls methods
that do not exist; its `bridge_sde` adds sigma^2 times the score of p_t to a given drift, a bridge only where the score is that of the
bridge's own reversal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, register_model

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SchrodingerBridgeConfig:
    """Settings of a diffusion Schroedinger bridge.

    Attributes:
        features: D, width of a sample.
        embedding: Width of the sinusoids of a step's number, even and at least 4.
        encoder: Width inside the encoders of sample and step.
        hidden: Width of the two hidden layers after them.
        steps: N, number of steps.
        gamma: Half the variance of a step.
        direction: Which chain the graph runs, `backward` (prior to data) or `forward`.
    """

    features: int = 2
    embedding: int = 16
    encoder: int = 16
    hidden: int = 128
    steps: int = 20
    gamma: float = 0.01
    direction: Literal["backward", "forward"] = "backward"

    def __post_init__(self) -> None:
        for name in ("features", "encoder", "hidden", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.embedding < 4 or self.embedding % 2:
            raise ValueError(f"embedding must be even and at least 4, got {self.embedding}")
        if self.gamma <= 0:
            raise ValueError(f"gamma must be above 0, got {self.gamma}")
        if self.direction not in ("backward", "forward"):
            raise ValueError(f"direction must be backward or forward, got {self.direction!r}")


class MLP(nn.Module):
    """Linear layers with leaky ReLU between them."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers = [nn.Linear(i, o) for i, o in itertools.pairwise(widths)]
        self.layers = nn.ModuleList(layers)
        for layer in layers:  # torch's default shrinks the signal at every layer
            nn.init.xavier_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(…, first width) to (…, last width)."""
        *inner, last = self.layers
        for layer in inner:
            x = F.leaky_relu(layer(x))
        out: Tensor = last(x)
        return out


class ScoreNetwork(nn.Module):
    """The drift of one direction: (B, D) and a step's number to (B, D)."""

    def __init__(self, config: SchrodingerBridgeConfig) -> None:
        super().__init__()
        self.embedding = config.embedding
        self.wide = 2 * config.embedding
        self.t_encoder = MLP([config.embedding, config.encoder, self.wide])
        self.x_encoder = MLP([config.features, config.encoder, self.wide])
        self.net = MLP([2 * self.wide, config.hidden, config.hidden, config.features])

    def forward(self, x: Tensor, k: int) -> Tensor:
        """The drift in step k. The step is a number, so that all that depends on it alone becomes a constant."""
        half = self.embedding // 2
        angles = k * torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / (half - 1)))
        sinusoids = torch.cat([torch.sin(angles), torch.cos(angles)])[None].to(x.dtype)
        first, *others = self.net.layers
        assert isinstance(first, nn.Linear)
        at_x, at_t = first.weight[:, : self.wide], first.weight[:, self.wide :]
        # The first layer over [x, t], written as two.
        x = F.linear(self.x_encoder(x), at_x) + F.linear(self.t_encoder(sinusoids), at_t, first.bias)
        for layer in others:
            x = layer(F.leaky_relu(x))
        return x


class SchrodingerBridge(nn.Module):
    """Both chains of a bridge, of which one is run."""

    def __init__(self, config: SchrodingerBridgeConfig) -> None:
        super().__init__()
        self.config = config
        self.forwards = ScoreNetwork(config)
        self.backwards = ScoreNetwork(config)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the chain.

        Args:
            x: Where it starts, (B, D).
            noise: Standard normal, (B, N, D); the last of the backward chain is not read.

        Returns:
            Where it ends (B, D), and all N + 1 places (B, N + 1, D).
        """
        config, backward = self.config, self.config.direction == "backward"
        net, size = self.backwards if backward else self.forwards, math.sqrt(2 * config.gamma)
        path = [x]
        for k in range(config.steps):
            x = x + net(x, k)
            if not backward or k < config.steps - 1:
                x = x + size * noise[:, k]
            path.append(x)
        return x, torch.stack(path, dim=1)


Drift = Callable[[Array, int], Array]
"""From places (n, D) and the number of steps made to the change of the mean, (n, D)."""

Fit = Callable[[Sequence[Array], Sequence[Array]], Drift]
"""A regression: from places (n, D) and wanted changes (n, D), for each number of steps made, to a drift."""


def iterative_proportional_fitting(
    data: Callable[[int], Array],
    prior: Callable[[int], Array],
    fit: Fit,
    *,
    gammas: Sequence[float],
    iterations: int,
    samples: int,
    rng: np.random.Generator,
    reference: Drift | None = None,
) -> tuple[Drift, Drift]:
    """Algorithm 1 of De Bortoli et al., on the host: each chain is fitted to the reversal of the other by the regression of its means.

    A step of a chain is x' = m(x) + sqrt(2 gamma) z with m(x) = x + drift(x). What the reversal is fitted to is its change m(x) - m(x'), at
    x' (their proposition 3).

    Args:
        data: Draws n samples (n, D) of the data distribution.
        prior: Draws n samples (n, D) of the prior.
        fit: The regression.
        gammas: Half the variance of each step.
        iterations: Number of fits of each chain.
        samples: Trajectories of each fit.
        rng: Gives the noise of the trajectories.
        reference: The drift of the reference process; Brownian motion when None.

    Returns:
        The drifts of the forward and the backward chain.
    """
    forward: Drift = reference or (lambda x, _: np.zeros_like(x))
    backward: Drift = forward
    for _ in range(iterations):
        backward = fit(*_reversal(data(samples), forward, gammas, rng))
        forward = fit(*_reversal(prior(samples), backward, gammas[::-1], rng))
    return forward, backward


def _reversal(x: Array, drift: Drift, gammas: Sequence[float], rng: np.random.Generator) -> tuple[list[Array], list[Array]]:
    """Places and wanted changes of the chain that runs back, from one run of a chain; in the order of the steps that go back."""
    places, changes = [], []
    for k, gamma in enumerate(gammas):
        mean = x + drift(x, k)
        x = mean + math.sqrt(2 * gamma) * rng.standard_normal(x.shape)
        places.append(x)
        changes.append(mean - (x + drift(x, k)))
    return places[::-1], changes[::-1]


@register_model(
    "schrodinger-bridge-tiny",
    SchrodingerBridgeConfig(features=4, embedding=8, encoder=8, hidden=32, steps=6, gamma=0.05),
    summary="Schroedinger bridge of 6 steps, prior to data, for trying",
)
@register_model(
    "schrodinger-bridge-forward-tiny",
    SchrodingerBridgeConfig(features=4, embedding=8, encoder=8, hidden=32, steps=6, gamma=0.05, direction="forward"),
    summary="Schroedinger bridge of 6 steps, data to prior, for trying",
)
@register_model("schrodinger-bridge-2d", SchrodingerBridgeConfig(), summary="Schroedinger bridge for 2-D data, 20 steps, prior to data")
@register_model(
    "schrodinger-bridge-forward-2d",
    SchrodingerBridgeConfig(direction="forward"),
    summary="Schroedinger bridge for 2-D data, 20 steps, data to prior",
)
def schrodinger_bridge(config: SchrodingerBridgeConfig) -> ModelSpec:
    """A diffusion Schroedinger bridge."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        shapes = {"x": (sizes["batch"], config.features), "noise": (sizes["batch"], config.steps, config.features)}
        return {name: torch.from_numpy(rng.standard_normal(shape, dtype="float32")) for name, shape in shapes.items()}

    return ModelSpec(
        build=lambda: SchrodingerBridge(config).eval(),
        inputs=inputs,
        sizes={"batch": 2},
        dynamic={"x": {0: "batch"}, "noise": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 64)},
        fixed={"noise": {1: "the steps are unrolled; --set steps=N builds another"}},
        outputs=("x_end", "path"),
        source="De Bortoli et al., Diffusion Schroedinger Bridge with Applications to Score-Based Generative Modeling, arXiv:2106.01357; "
        "the authors' code, JTT94/diffusion_schrodinger_bridge",
    )
