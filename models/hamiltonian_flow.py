"""Neural Hamiltonian flow: an invertible, volume-preserving generator (Toth et al., arXiv:1909.13789, section 3.3).

Position and momentum of a base distribution, standard normal, follow a learned Hamiltonian H(q, p) = K(p) + V(q) with the leapfrog
integrator; the position at the end is the sample. Each step is a composition of shears, so that it keeps the volume exactly, and is undone
by the same steps backwards:

    p <- p - dt/2 V'(q),   q <- q + dt K'(p),   p <- p - dt/2 V'(q)

K and V are MLPs with softplus; their gradients are part of the graph, the chain rule written out (`SoftplusEnergy`), so that every target
computes them with the operators of any network. Of the flow of fixed kinetic energy (Souveton et al., arXiv:2302.01955) only K differs: K =
sum p_i^2 / (2 m_i) with learned log m_i (`kinetic="fixed"`).

Three forms share their weights:

- `hamiltonian-flow-…`: base (q, p) to data. `log_density` has log N(q_i) + log N(p_i) for each coordinate; the sum is the log density of
the base and, the volume being kept, of the data point as well. `energies` has K and V before every step and at the end; their sum H is
conserved up to the integrator's error, and an artifact whose arithmetic is off drifts.
- `hamiltonian-flow-inverse-…`: data (q, p) back to the base, with the log density and the energies in the order of the calls.
- `hamiltonian-flow-elbo-…`: a data point q and standard normal noise (in the place of p) to the lower bound of log p(q): the momentum is
drawn from an encoder, p = mu(q) + sigma(q) noise, and taken back. `elbo` has the terms log N(q_0), log N(p_0) and -log f(p | q); the mean
of their sum over noise is the bound itself.

K, V and the encoder are 3-layer MLPs of 128, as in the paper's appendix for 2-D densities (`hamiltonian-flow-2d`); the number and size
of the steps are not given there and are inferred. sigma is an exponential of half the log variance.

The survey's sketch integrates a Hamiltonian that is not separable with torchdiffeq's adaptive dopri5, which is neither symplectic nor
exactly invertible, and has no density; the paper's leapfrog is what is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import Analysis, ModelSpec, SizeRange, Tolerance, register_model


@dataclass(frozen=True)
class HamiltonianFlowConfig:
    """Settings of a neural Hamiltonian flow.

    Attributes:
        features: D, width of position and momentum.
        hidden: Width inside K, V and the encoder.
        steps: Leapfrog steps.
        dt: Size of a step.
        kinetic: `learned` (an MLP), or `fixed` (quadratic with learned masses).
        form: What the graph computes: `forward`, `inverse` or `elbo`.
    """

    features: int = 2
    hidden: int = 128
    steps: int = 10
    dt: float = 0.1
    kinetic: Literal["learned", "fixed"] = "learned"
    form: Literal["forward", "inverse", "elbo"] = "forward"

    def __post_init__(self) -> None:
        for name in ("features", "hidden", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dt <= 0:
            raise ValueError(f"dt must be above 0, got {self.dt}")
        if self.kinetic not in ("learned", "fixed"):
            raise ValueError(f"kinetic must be learned or fixed, got {self.kinetic!r}")
        if self.form not in ("forward", "inverse", "elbo"):
            raise ValueError(f"form must be forward, inverse or elbo, got {self.form!r}")


class SoftplusEnergy(nn.Module):
    """E(x) = softplus(W_3 softplus(W_2 softplus(W_1 x + b_1) + b_2) + b_3), and its gradient. (B, D) to (B, 1) and (B, D)."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 1)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.xavier_normal_(layer.weight, gain=1.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The energy and its gradient: the chain rule, written out, with the logistic function as softplus's slope."""
        a = self.fc1(x)
        b = self.fc2(F.softplus(a))
        c = self.fc3(F.softplus(b))
        back = torch.sigmoid(c) * self.fc3.weight * torch.sigmoid(b)
        back = torch.matmul(back, self.fc2.weight) * torch.sigmoid(a)
        return F.softplus(c), torch.matmul(back, self.fc1.weight)


class QuadraticEnergy(nn.Module):
    """E(p) = sum p_i^2 / (2 m_i), and its gradient. (B, D) to (B, 1) and (B, D)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_mass = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The energy and its gradient."""
        velocity = x * torch.exp(-self.log_mass)
        return 0.5 * (x * velocity).sum(dim=1, keepdim=True), velocity


class MomentumEncoder(nn.Module):
    """f(p | q): mean and log variance of the momentum, each an MLP. (B, D) to (B, D) twice."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()

        def mlp() -> nn.Sequential:
            return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, features))

        self.mean, self.log_variance = mlp(), mlp()

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance."""
        return self.mean(q), self.log_variance(q)


def log_normal(x: Tensor) -> Tensor:
    """The log density of a standard normal distribution in each coordinate."""
    return -0.5 * (x * x) - 0.5 * math.log(2 * math.pi)


class HamiltonianFlow(nn.Module):
    """The flow; see the module's text."""

    def __init__(self, config: HamiltonianFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.potential = SoftplusEnergy(config.features, config.hidden)
        self.kinetic: nn.Module = (
            SoftplusEnergy(config.features, config.hidden) if config.kinetic == "learned" else QuadraticEnergy(config.features)
        )
        self.encoder = MomentumEncoder(config.features, config.hidden)

    def leapfrog(self, q: Tensor, p: Tensor, dt: float) -> tuple[Tensor, Tensor, Tensor]:
        """`steps` steps of size dt, which is negative for the inverse.

        Args:
            q: Positions (B, D).
            p: Momenta (B, D).
            dt: Size of a step.

        Returns:
            Positions and momenta (B, D) at the end, and K and V before each step and at the end, (B, steps + 1, 2).
        """
        potential, force = self.potential(q)
        energies = []
        for _ in range(self.config.steps):
            energies.append(torch.cat([self.kinetic(p)[0], potential], dim=1))
            p = p - (dt / 2) * force
            q = q + dt * self.kinetic(p)[1]
            potential, force = self.potential(q)
            p = p - (dt / 2) * force
        energies.append(torch.cat([self.kinetic(p)[0], potential], dim=1))
        return q, p, torch.stack(energies, dim=1)

    def forward(self, q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        """What the form says.

        Args:
            q: Positions (B, D).
            p: Momenta (B, D); of the form `elbo`, standard normal noise of that shape.

        Returns:
            Positions and momenta (B, D), the log density (B, D), and the energies (B, steps + 1, 2); of the form `elbo`, the bound (B, 3)
            and the energies. What they sum to is in the module's text.
        """
        form, dt = self.config.form, self.config.dt
        if form == "forward":
            end, momentum, energies = self.leapfrog(q, p, dt)
            return end, momentum, log_normal(q) + log_normal(p), energies
        if form == "inverse":
            start, momentum, energies = self.leapfrog(q, p, -dt)
            return start, momentum, log_normal(start) + log_normal(momentum), energies
        mean, log_variance = self.encoder(q)
        start, momentum, energies = self.leapfrog(q, mean + torch.exp(0.5 * log_variance) * p, -dt)
        terms = (log_normal(start), log_normal(momentum), 0.5 * log_variance - log_normal(p))
        return torch.stack([term.sum(dim=1) for term in terms], dim=1), energies


_SOURCE = (
    "Toth et al., Hamiltonian Generative Networks, arXiv:1909.13789, section 3.3; fixed kinetic energy: Souveton et al., arXiv:2302.01955"
)


@register_model(
    "hamiltonian-flow-tiny",
    HamiltonianFlowConfig(features=4, hidden=16, steps=4, dt=0.9),
    summary="Neural Hamiltonian flow with 4 leapfrog steps, base to data, for trying",
)
@register_model(
    "hamiltonian-flow-inverse-tiny",
    HamiltonianFlowConfig(features=4, hidden=16, steps=4, dt=0.9, form="inverse"),
    summary="Neural Hamiltonian flow with 4 leapfrog steps, data to base, for trying",
)
@register_model(
    "hamiltonian-flow-elbo-tiny",
    HamiltonianFlowConfig(features=4, hidden=16, steps=4, dt=0.9, form="elbo"),
    summary="Neural Hamiltonian flow with 4 leapfrog steps, lower bound of the log density, for trying",
)
@register_model("hamiltonian-flow-2d", HamiltonianFlowConfig(), summary="Neural Hamiltonian flow for 2-D densities, 0.07 M parameters")
@register_model(
    "hamiltonian-flow-inverse-2d",
    HamiltonianFlowConfig(form="inverse"),
    summary="Neural Hamiltonian flow for 2-D densities, data to base",
)
@register_model(
    "hamiltonian-flow-fixed-kinetic-2d",
    HamiltonianFlowConfig(kinetic="fixed"),
    summary="Neural Hamiltonian flow of fixed kinetic energy for 2-D densities",
)
def hamiltonian_flow(config: HamiltonianFlowConfig) -> ModelSpec:
    """A neural Hamiltonian flow."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        shape = (sizes["batch"], config.features)
        return {name: torch.from_numpy(rng.standard_normal(shape, dtype="float32")) for name in ("q", "p")}

    return ModelSpec(
        build=lambda: HamiltonianFlow(config).eval(),
        inputs=inputs,
        sizes={"batch": 2},
        dynamic={"q": {0: "batch"}, "p": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 64)},
        outputs=("elbo", "energies") if config.form == "elbo" else ("q_end", "p_end", "log_density", "energies"),
        source=_SOURCE,
        # The energies of one row stay within a range of some 0.2, which errors are compared with.
        tolerances={"fp16": Tolerance(min_psnr=50.0, max_relative=1e-2)},
        analyses=(Analysis("energy", outputs=("energies",)),),
    )
