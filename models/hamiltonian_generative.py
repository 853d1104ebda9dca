"""Hamiltonian generative network: images of a physical system from learned Hamiltonian dynamics (Toth et al., arXiv:1909.13789).

A sequence of pictures, stacked along the channels, is encoded into z ~ N(mean, variance); three strided convolutions map z to an abstract
position and momentum (q, p), pictures of C channels each; these follow a learned Hamiltonian, and every position on the way is decoded into
a picture:

    p' = p - dt/2 H_q(q, p),   q <- q + dt H_p(q, p'),   p <- p' - dt/2 H_q(q, p')            (leapfrog)

H is a stack of convolutions with softplus and a linear layer, over q and p together. Leapfrog is of second order and symplectic for K(p) +
V(q); of an H that is not separable, as the paper's, these explicit steps are of first order. The gradients of H are part of the graph,
written out (`ConvEnergy`: transposed convolutions and logistic functions), so that every target computes them with its ordinary operators.

Outputs: the pictures, and `energies`, what each of the h w places adds to H at every time (the linear layer's sum over channels, and its
share of the bias). Their sum H is constant in exact dynamics, and what it drifts in an artifact beyond what it drifts in the reference is
the artifact's error. Noise is an input; with zeros z is the mean.

From the paper's appendix: 8 convolutions of 3x3 with 32, then 64 channels, and 48 channels of z; strides of 2 from 32x32 to 4x4; 6
convolutions of 64 in H; three residual blocks in the decoder, each of which doubles the size; dt = 0.125 and rollouts of 30 pictures
(`hamiltonian-generative-32`). Inferred: 16 channels each of q and p (as in the open reimplementation by Balsells Rodas, Canal Anton &
Taschin, arXiv:2106.09456), the inside of a residual block, nearest-neighbour upsampling, and no activation on (q, p).

The survey's sketch has K(p) + V(q), no encoder and no decoder, and updates q and p at once from the old state: explicit Euler, which is not
symplectic and gains energy at every step, whatever its comment says.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import Analysis, ModelSpec, SizeRange, register_model


@dataclass(frozen=True)
class HGNConfig:
    """Settings of a Hamiltonian generative network.

    Attributes:
        size: Height and width of a picture, a multiple of 8.
        channels: Channels of a picture.
        frames: Pictures given to the encoder.
        encoder_width: Channels inside the encoder; the first layer has half of them.
        encoder_depth: Convolutions of the encoder, at least 2.
        latent: Channels of z.
        phase: Channels of q and of p.
        width: Channels of the layers after z: to phase space, of the Hamiltonian, and of the decoder.
        energy_depth: Convolutions of the Hamiltonian.
        steps: Leapfrog steps; there is one more picture than steps.
        dt: Size of a step.
    """

    size: int = 32
    channels: int = 3
    frames: int = 30
    encoder_width: int = 64
    encoder_depth: int = 8
    latent: int = 48
    phase: int = 16
    width: int = 64
    energy_depth: int = 6
    steps: int = 29
    dt: float = 0.125

    def __post_init__(self) -> None:
        for name in ("channels", "frames", "encoder_width", "latent", "phase", "width", "energy_depth", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.size < 8 or self.size % 8:
            raise ValueError(f"size must be a multiple of 8, got {self.size}")
        if self.encoder_depth < 2 or self.encoder_width % 2:
            raise ValueError(f"encoder_depth must be at least 2 and encoder_width even, got {self.encoder_depth} and {self.encoder_width}")
        if self.dt <= 0:
            raise ValueError(f"dt must be above 0, got {self.dt}")


class Encoder(nn.Module):
    """Convolutions with ReLU: pictures (B, frames * channels, H, W) to mean and log variance of z, (B, latent, H, W) each."""

    def __init__(self, config: HGNConfig) -> None:
        super().__init__()
        width = config.encoder_width
        widths = [config.frames * config.channels, width // 2, *[width] * (config.encoder_depth - 2)]
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(widths))
        self.mean = nn.Conv2d(widths[-1], config.latent, 3, padding=1)
        self.log_variance = nn.Conv2d(widths[-1], config.latent, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance."""
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.mean(x), self.log_variance(x)


class PhaseSpace(nn.Module):
    """Three convolutions of stride 2: z (B, latent, H, W) to q and p, (B, phase, H / 8, W / 8) each."""

    def __init__(self, config: HGNConfig) -> None:
        super().__init__()
        widths = [config.latent, config.width, config.width, 2 * config.phase]
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in itertools.pairwise(widths))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Position and momentum."""
        first, second, last = self.layers
        q, p = last(F.relu(second(F.relu(first(z))))).chunk(2, dim=1)
        return q, p


class ConvEnergy(nn.Module):
    """H(q, p): 3x3 convolutions with softplus over q and p together, and a linear layer.

    The gradient is the chain rule, written out: the transpose of a convolution of stride 1 is `conv_transpose2d` with the same weights, and
    the slope of softplus is the logistic function.
    """

    def __init__(self, config: HGNConfig) -> None:
        super().__init__()
        side = config.size // 8
        widths = [2 * config.phase, *[config.width] * config.energy_depth]
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(widths))
        self.linear = nn.Linear(config.width * side * side, 1)
        self.shape = (1, config.width, side, side)

    def forward(self, q: Tensor, p: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What each place adds to H, (B, h w), and what `gradient` needs: the values before each softplus."""
        x, before = torch.cat([q, p], dim=1), []
        for layer in self.layers:
            before.append(layer(x))
            x = F.softplus(before[-1])
        places = (x * self.linear.weight.reshape(self.shape)).sum(dim=1).flatten(1)
        return places + self.linear.bias / places.shape[1], before

    def gradient(self, before: list[Tensor]) -> tuple[Tensor, Tensor]:
        """H_q and H_p, shaped like q and p."""
        back = self.linear.weight.reshape(self.shape)
        for layer, value in zip(reversed(list(self.layers)), reversed(before), strict=True):
            assert isinstance(layer, nn.Conv2d)
            back = F.conv_transpose2d(back * torch.sigmoid(value), layer.weight, padding=1)
        over_q, over_p = back.chunk(2, dim=1)
        return over_q, over_p


class ResidualBlock(nn.Module):
    """Twice the size, and two convolutions around a leaky ReLU beside a 1x1 convolution: (B, i, H, W) to (B, o, 2 H, 2 W)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.leaky_relu(self.skip(x) + self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2)


class Decoder(nn.Module):
    """Positions (N, phase, H / 8, W / 8) to pictures (N, channels, H, W) in [0, 1]."""

    def __init__(self, config: HGNConfig) -> None:
        super().__init__()
        widths = [config.phase, config.width, config.width, config.width]
        self.blocks = nn.ModuleList(ResidualBlock(i, o) for i, o in itertools.pairwise(widths))
        self.out = nn.Conv2d(config.width, config.channels, 3, padding=1)

    def forward(self, q: Tensor) -> Tensor:
        """The pictures."""
        for block in self.blocks:
            q = block(q)
        return torch.sigmoid(self.out(q))


class HGN(nn.Module):
    """The network; see the module's text."""

    def __init__(self, config: HGNConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.phase_space = PhaseSpace(config)
        self.hamiltonian = ConvEnergy(config)
        self.decoder = Decoder(config)
        for layer in self.modules():  # torch's default shrinks the signal at every layer
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_normal_(layer.weight, gain=1.4)
        nn.init.normal_(self.hamiltonian.linear.weight, std=config.width**-0.5)

    def rollout(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Follows the Hamiltonian.

        Args:
            q: Position (B, phase, h, w).
            p: Momentum, of the same shape.

        Returns:
            Positions (B, steps + 1, phase, h, w), and what each place adds to H at these times (B, steps + 1, h w).
        """
        dt, positions, energies = self.config.dt, [q], []
        for _ in range(self.config.steps):
            energy, before = self.hamiltonian(q, p)
            energies.append(energy)
            p = p - (dt / 2) * self.hamiltonian.gradient(before)[0]
            q = q + dt * self.hamiltonian.gradient(self.hamiltonian(q, p)[1])[1]
            p = p - (dt / 2) * self.hamiltonian.gradient(self.hamiltonian(q, p)[1])[0]
            positions.append(q)
        energies.append(self.hamiltonian(q, p)[0])
        return torch.stack(positions, dim=1), torch.stack(energies, dim=1)

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """From given pictures to a rollout.

        Args:
            frames: Pictures (B, frames, channels, H, W) in [0, 1].
            noise: Standard normal, (B, latent, H, W).

        Returns:
            Pictures (B, steps + 1, channels, H, W), and the energies (B, steps + 1, h w), whose sums are H.
        """
        config, batch = self.config, frames.shape[0]
        mean, log_variance = self.encoder(frames.reshape(batch, config.frames * config.channels, config.size, config.size))
        q, p = self.phase_space(mean + torch.exp(0.5 * log_variance) * noise)
        positions, energies = self.rollout(q, p)
        pictures = self.decoder(positions.flatten(0, 1))
        return pictures.reshape(batch, config.steps + 1, config.channels, config.size, config.size), energies


@register_model(
    "hamiltonian-generative-tiny",
    HGNConfig(
        size=16, channels=1, frames=3, encoder_width=16, encoder_depth=3, latent=8, phase=4, width=16, energy_depth=2, steps=3, dt=1.9
    ),
    summary="Hamiltonian generative network with 3 leapfrog steps on 16x16 pictures, for trying",
)
@register_model(
    "hamiltonian-generative-32",
    HGNConfig(),
    summary="Hamiltonian generative network for 30 pictures of 32x32, 0.78 M parameters",
)
def hamiltonian_generative(config: HGNConfig) -> ModelSpec:
    """A Hamiltonian generative network."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch, size = sizes["batch"], config.size
        return {
            "frames": torch.from_numpy(rng.random((batch, config.frames, config.channels, size, size), dtype="float32")),
            "noise": torch.from_numpy(rng.standard_normal((batch, config.latent, size, size), dtype="float32")),
        }

    return ModelSpec(
        build=lambda: HGN(config).eval(),
        inputs=inputs,
        sizes={"batch": 2},
        dynamic={"frames": {0: "batch"}, "noise": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 16)},
        fixed={"frames": {1: "the pictures are stacked along the channels of the first convolution"}},
        outputs=("pictures", "energies"),
        source="Toth et al., Hamiltonian Generative Networks, arXiv:1909.13789",
        analyses=(Analysis("energy", outputs=("energies",)),),
    )
