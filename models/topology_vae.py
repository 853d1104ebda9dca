"""A variational auto-encoder whose latent space is measured through its decoder: geodesics under the pulled-back metric.

Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv:1312.6114, for the network; Arvanitidis, Hansen and Hauberg, "Latent Space
Oddity", arXiv:1710.11379, for the geometry: the decoder g gives the latent space the metric M(z) = J(z)^T J(z), J its Jacobian, so that the
length of a latent curve is that of its image. A geodesic from z_0 to z_N minimises the energy of the decoded curve (Shao, Kumar and
Fletcher, arXiv:1711.08014, algorithm 1), discretised to N segments

    E = N / 2 sum_i |g(z_(i+1)) - g(z_i)|^2,        dE/dz_i = N J(z_i)^T (2 g(z_i) - g(z_(i-1)) - g(z_(i+1)))

by a fixed number of gradient steps from the straight line, the ends held: z_i <- z_i - s_i / N dE/dz_i. The columns of J are carried along
with g through the decoder's tanh layers, so that a step is d + 1 passes through it for latents of d channels.

No step is too long, whatever the weights: s_i = min(rate, 1 / (4 |J(z_i)|^2)) with the Frobenius norm of J, which is no less than the
spectral one. Up to the decoder's curvature between neighbours, which is of order 1 / N^2, the energy is the quadratic form of
J^T T J, T = tridiag(-1, 2, -1) with eigenvalues below 4; steps lower it as long as 4 s_i |J(z_i)|^2 < 2, and here that is 1 at most.

What deviates: the survey's sketch estimates a metric tensor at the two end points alone and then interpolates with it; the metric is that
of every point on the way. Arvanitidis et al. add the Jacobian of a decoded standard deviation, from an RBF network that is fitted after the
training, which keeps curves near the data; this decoder has a mean only. Persistent homology is no part of the network: see
`calibration.topology`.

Inferred: widths. The paper's decoders are of two hidden layers with tanh; the encoder here is its mirror.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..exporter.spec import Analysis, ModelSpec, SizeRange, Tolerance, register_model

_FORMS = ("reconstruct", "encode", "decode", "geodesic")


@dataclass(frozen=True)
class TopologyVAEConfig:
    """Settings of a VAE with geodesics.

    Attributes:
        data_size: Size of a data point.
        latent_size: Size of a latent.
        hidden_size: Width of the hidden layers.
        depth: Hidden layers of the encoder and of the decoder.
        segments: N, segments of a discrete curve.
        steps: Gradient steps.
        rate: The longest step; a steep decoder makes them shorter, see the module's text.
        form: `reconstruct` (data and noise to reconstruction, mean and log-variance), `encode` (data and noise to latent, mean and
            log-variance), `decode` (latent to data) or `geodesic` (two latents to the curve between them).
    """

    data_size: int = 16
    latent_size: int = 2
    hidden_size: int = 32
    depth: int = 2
    segments: int = 8
    steps: int = 6
    rate: float = 0.04
    form: str = "reconstruct"

    def __post_init__(self) -> None:
        for name in ("data_size", "latent_size", "hidden_size", "depth", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.segments < 2:
            raise ValueError(f"segments must be at least 2, or no point lies between the ends, got {self.segments}")
        if self.rate <= 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")
        if self.form not in _FORMS:
            raise ValueError(f"form must be one of {', '.join(_FORMS)}, got {self.form!r}")


class Tanh(nn.Module):
    """Linear layers with tanh between them, (..., in) to (..., out), and their Jacobian. There are two layers or more."""

    def __init__(self, sizes: list[int], last_gain: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(given, out) for given, out in itertools.pairwise(sizes))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            gain = last_gain if layer is self.layers[-1] else 1.2  # tanh bends what it is given, so that geodesics bend
            nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
            nn.init.normal_(layer.bias, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """The network's output."""
        for layer in self.layers:
            x = layer(x if layer is self.layers[0] else torch.tanh(x))
        return x

    def with_jacobian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output (..., out) at x (..., in), and the columns of its Jacobian there (..., in, out)."""
        first, *others = (layer for layer in self.layers if isinstance(layer, nn.Linear))
        x, columns = first(x), first.weight.mT  # the same at every point until the first tanh
        for layer in others:
            h = torch.tanh(x)
            columns = torch.matmul(columns * (1 - h * h).unsqueeze(-2), layer.weight.mT)
            x = layer(h)
        return x, columns


class TopologyVAE(nn.Module):
    """The network; see the module's text."""

    def __init__(self, config: TopologyVAEConfig) -> None:
        super().__init__()
        self.config = config
        hidden = [config.hidden_size] * config.depth
        # Means that are spread like the prior, and not a tenth of it, even before any training.
        self.encoder = Tanh([config.data_size, *hidden, 2 * config.latent_size], last_gain=2.0)
        self.decoder = Tanh([config.latent_size, *hidden, config.data_size], last_gain=0.6)

    def encode(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Data (B, m) and standard normal noise (B, d) to latent, mean and log-variance, (B, d) each. Zero noise gives the mean."""
        mean, logvar = self.encoder(x).chunk(2, -1)
        return mean + torch.exp(0.5 * logvar) * noise, mean, logvar

    def geodesic(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, d) to the curve between them (B, N + 1, d) and its image (B, N + 1, m)."""
        n = self.config.segments
        line = torch.arange(1, n, dtype=start.dtype, device=start.device).reshape(1, -1, 1) / n
        first, last = start.unsqueeze(1), end.unsqueeze(1)
        inner = first + line * (last - first)
        ends = self.decoder(torch.cat([first, last], 1))
        for _ in range(self.config.steps):
            points, columns = self.decoder.with_jacobian(inner)
            image = torch.cat([ends[:, :1], points, ends[:, 1:]], 1)
            differences = image[:, 1:] - image[:, :-1]
            # 2 g_i - g_(i-1) - g_(i+1), as the difference of differences.
            bend = differences[:, :-1] - differences[:, 1:]
            gradient = torch.matmul(columns, bend.unsqueeze(-1)).squeeze(-1)
            # 1 / sqrt(s) = max(rate^(-1/2), 2 |J|), from the mean of squares: half precision does not hold the sum of a steep decoder's.
            root = (2 * columns.shape[-1] ** 0.5) * columns.square().mean(-1).sum(-1, keepdim=True).sqrt()
            root = root.clamp(min=self.config.rate**-0.5)
            inner = inner - gradient / root / root
        image = torch.cat([ends[:, :1], self.decoder(inner), ends[:, 1:]], 1)
        return torch.cat([first, inner, last], 1), image


def curve_energy(image: Tensor) -> Tensor:
    """E of decoded curves (B, N + 1, m), (B,)."""
    return 0.5 * (image.shape[1] - 1) * image.diff(dim=1).square().sum((1, 2))


class Reconstruct(TopologyVAE):
    """Data to data."""

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Data (B, m) and noise (B, d) to the reconstruction (B, m), and the mean and log-variance of its latent, (B, d) each."""
        z, mean, logvar = self.encode(x, noise)
        return self.decoder(z), mean, logvar


class Encode(TopologyVAE):
    """Data to latents."""

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `encode`."""
        return self.encode(x, noise)


class Decode(TopologyVAE):
    """Latents to data."""

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, d) to data (B, m)."""
        out: Tensor = self.decoder(z)
        return out


class Geodesic(TopologyVAE):
    """Two latents to the curve between them."""

    def forward(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """See `geodesic`."""
        return self.geodesic(start, end)


_MODULES: dict[str, type[TopologyVAE]] = {"reconstruct": Reconstruct, "encode": Encode, "decode": Decode, "geodesic": Geodesic}


@register_model("topology-vae-tiny", TopologyVAEConfig(), summary="VAE of width 32 with 2 latent channels, for trying")
@register_model("topology-vae-encode-tiny", TopologyVAEConfig(form="encode"), summary="The encoder of topology-vae-tiny")
@register_model("topology-vae-decode-tiny", TopologyVAEConfig(form="decode"), summary="The decoder of topology-vae-tiny")
@register_model(
    "topology-vae-geodesic-tiny", TopologyVAEConfig(form="geodesic"), summary="Geodesics in the latent space of topology-vae-tiny"
)
@register_model(
    "topology-vae-mnist", TopologyVAEConfig(data_size=784, hidden_size=256), summary="VAE of 28x28 pictures with 2 latent channels"
)
@register_model(
    "topology-vae-encode-mnist",
    TopologyVAEConfig(data_size=784, hidden_size=256, form="encode"),
    summary="The encoder of topology-vae-mnist",
)
@register_model(
    "topology-vae-decode-mnist",
    TopologyVAEConfig(data_size=784, hidden_size=256, form="decode"),
    summary="The decoder of topology-vae-mnist",
)
@register_model(
    "topology-vae-geodesic-mnist",
    TopologyVAEConfig(data_size=784, hidden_size=256, segments=32, steps=32, rate=0.005, form="geodesic"),
    summary="Geodesics in the latent space of topology-vae-mnist, 32 segments, 32 steps",
)
def topology_vae(config: TopologyVAEConfig) -> ModelSpec:
    """A VAE with geodesics, in one of its forms."""
    shapes = {
        "reconstruct": {"x": config.data_size, "noise": config.latent_size},
        "encode": {"x": config.data_size, "noise": config.latent_size},
        "decode": {"z": config.latent_size},
        "geodesic": {"start": config.latent_size, "end": config.latent_size},
    }[config.form]
    outputs = {
        "reconstruct": ("reconstruction", "mean", "logvar"),
        "encode": ("z", "mean", "logvar"),
        "decode": ("reconstruction",),
        "geodesic": ("curve", "points"),
    }[config.form]

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(rng.standard_normal((sizes["batch"], size), dtype=np.float32)) for name, size in shapes.items()}

    return ModelSpec(
        build=lambda: _MODULES[config.form](config).eval(),
        inputs=inputs,
        sizes={"batch": 4},
        dynamic={name: {0: "batch"} for name in shapes},
        ranges={"batch": SizeRange(1, 4, 256)},
        outputs=outputs,
        # The usual PSNR is that of outputs which range over 8 standard deviations; the 2 numbers of one point's latent range over 1 or 2.
        tolerances={"fp16": Tolerance(min_psnr=50.0, max_relative=1e-2), "bf16": Tolerance(min_psnr=30.0, max_relative=1e-1)}
        if config.form in ("encode", "reconstruct")
        else {},
        source="Arvanitidis, Hansen & Hauberg, Latent Space Oddity, arXiv:1710.11379; Kingma & Welling, Auto-Encoding Variational Bayes, "
        "arXiv:1312.6114; curve energy: Shao, Kumar & Fletcher, The Riemannian Geometry of Deep Generative Models, arXiv:1711.08014",
        analyses={
            "reconstruct": (Analysis("information-bottleneck", outputs=("mean", "logvar", "reconstruction")),),
            "encode": (Analysis("betti", outputs=("mean",)), Analysis("mutual-information", inputs=("x",), outputs=("z",))),
        }.get(config.form, ()),
    )
