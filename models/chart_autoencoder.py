"""Chart auto-encoder: a latent space of several overlapping charts, for data on a manifold that no single chart covers.

Schonsheck, Chen and Lai, "Chart Auto-Encoders for Manifold Structured Data", arXiv:1912.10094. With n charts of dimension d:

    z     = E(x)                      the initial encoder, shared
    z_a   = sigmoid(E_a(z))           coordinates in chart a, in the unit cube (0, 1)^d
    y_a   = D_a(z_a)                  what chart a makes of them
    p     = softmax(P(z))             how far each chart is to be trusted at x
    a*    = argmax_a p_a              the chart that x is assigned to; the first of those that are equally trusted
    y     = y_a*

A transition from chart a to chart b is phi_ab = E_b . E . D_a: the point is decoded by the one and encoded by the other. On the overlap of
two charts of a trained model it is the identity of the manifold.

The survey's sketch gives every ordered pair of charts a network of its own for the transition, and encodes each point in its own chart
only, by boolean masks, whose sizes depend on the data. In the paper transitions are compositions, without weights, and all charts encode
every point; so they do here, as one batched product a layer, and the assigned chart is chosen afterwards. The sketch's overlap factor is no
part of the network: how far charts overlap is learned.

Inferred: the paper gives layers experiment by experiment; here all networks are of `depth` hidden layers of one width with ReLU, the
initial encoder ending in `latent_size` channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import Analysis, ModelSpec, SizeRange, Tolerance, register_model

_FORMS = ("reconstruct", "decode", "transition")


@dataclass(frozen=True)
class ChartAutoencoderConfig:
    """Settings of a chart auto-encoder.

    Attributes:
        data_size: Size of a data point.
        latent_size: Size of the initial encoder's output.
        num_charts: n.
        chart_size: d, dimension of a chart.
        hidden_size: Width of every hidden layer.
        depth: Hidden layers of the initial encoder and of every chart's decoder; chart encoders and the prediction have one.
        form: `reconstruct` (a point to all charts, their probabilities, the assigned chart and the reconstruction), `decode` (coordinates
            and chart to a point) or `transition` (coordinates in one chart to those in another).
    """

    data_size: int = 3
    latent_size: int = 16
    num_charts: int = 4
    chart_size: int = 2
    hidden_size: int = 32
    depth: int = 1
    form: str = "reconstruct"

    def __post_init__(self) -> None:
        for name in ("data_size", "latent_size", "num_charts", "chart_size", "hidden_size", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.form not in _FORMS:
            raise ValueError(f"form must be one of {', '.join(_FORMS)}, got {self.form!r}")


class ChartLinear(nn.Module):
    """A linear layer for each chart, (n, B, in) to (n, B, out)."""

    def __init__(self, charts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(charts, in_features, out_features) * math.sqrt(2 / in_features))
        self.bias = nn.Parameter(torch.randn(charts, 1, out_features) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """One batched product."""
        return torch.matmul(x, self.weight) + self.bias


def _mlp(sizes: list[int], charts: int | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for given, out in itertools.pairwise(sizes):
        layers += [nn.Linear(given, out) if charts is None else ChartLinear(charts, given, out), nn.ReLU()]
    for layer in layers:
        if isinstance(layer, nn.Linear):  # torch's default would leave little of the data after a few layers
            nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(*layers[:-1])


class ChartAutoencoder(nn.Module):
    """The network; see the module's text."""

    def __init__(self, config: ChartAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        n, hidden = config.num_charts, [config.hidden_size] * config.depth
        self.encoder = _mlp([config.data_size, *hidden, config.latent_size])
        self.chart_encoders = _mlp([config.latent_size, config.hidden_size, config.chart_size], n)
        self.chart_decoders = _mlp([config.chart_size, *hidden, config.data_size], n)
        self.prediction = _mlp([config.latent_size, config.hidden_size, n])

    def charts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Points (B, m) to z (B, latent_size) and the coordinates in every chart (B, n, d)."""
        z = self.encoder(x)
        coordinates = torch.sigmoid(self.chart_encoders(z.unsqueeze(0)))
        return z, coordinates.transpose(0, 1)

    def decode_all(self, coordinates: Tensor) -> Tensor:
        """Coordinates in every chart (B, n, d) to what each chart makes of them (B, n, m)."""
        points: Tensor = self.chart_decoders(coordinates.transpose(0, 1)).transpose(0, 1)
        return points

    def pick(self, values: Tensor, chart: Tensor) -> Tensor:
        """Of values in every chart (B, n, k) those in one (B, k), chart (B,) int64."""
        one = chart.unsqueeze(-1) == torch.arange(self.config.num_charts, device=chart.device)
        return torch.where(one.unsqueeze(-1), values, torch.zeros_like(values)).sum(1)


class Reconstruct(ChartAutoencoder):
    """Points to charts and back."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points (B, m) to the reconstruction (B, m), probabilities (B, n), chart (B,) int64 and coordinates in every chart (B, n, d)."""
        z, coordinates = self.charts(x)
        logits = self.prediction(z)
        chart = logits.argmax(-1)
        return self.pick(self.decode_all(coordinates), chart), F.softmax(logits, dim=-1), chart, coordinates


class Decode(ChartAutoencoder):
    """Coordinates in a chart to points."""

    def forward(self, coordinates: Tensor, chart: Tensor) -> Tensor:
        """Coordinates (B, d) in the chart (B,) int64 to points (B, m)."""
        every = coordinates.unsqueeze(1).expand(-1, self.config.num_charts, -1)
        return self.pick(self.decode_all(every), chart)


class Transition(ChartAutoencoder):
    """Coordinates in one chart to those in another."""

    def forward(self, coordinates: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Coordinates (B, d) in chart `source` (B,) int64 to those of the same point in chart `target` (B,) int64, (B, d)."""
        every = coordinates.unsqueeze(1).expand(-1, self.config.num_charts, -1)
        return self.pick(self.charts(self.pick(self.decode_all(every), source))[1], target)


_MODULES: dict[str, type[ChartAutoencoder]] = {"reconstruct": Reconstruct, "decode": Decode, "transition": Transition}


@register_model("chart-autoencoder-tiny", ChartAutoencoderConfig(), summary="Chart auto-encoder of points in space, 4 charts, for trying")
@register_model(
    "chart-autoencoder-decode-tiny", ChartAutoencoderConfig(form="decode"), summary="Points from coordinates in chart-autoencoder-tiny"
)
@register_model(
    "chart-autoencoder-transition-tiny",
    ChartAutoencoderConfig(form="transition"),
    summary="From one chart of chart-autoencoder-tiny to another",
)
@register_model(
    "chart-autoencoder-mnist",
    ChartAutoencoderConfig(data_size=784, latent_size=64, num_charts=4, chart_size=4, hidden_size=256, depth=3),
    summary="Chart auto-encoder of 28x28 pictures, 4 charts of dimension 4",
)
@register_model(
    "chart-autoencoder-decode-mnist",
    ChartAutoencoderConfig(data_size=784, latent_size=64, num_charts=4, chart_size=4, hidden_size=256, depth=3, form="decode"),
    summary="28x28 pictures from coordinates in a chart",
)
@register_model(
    "chart-autoencoder-transition-mnist",
    ChartAutoencoderConfig(data_size=784, latent_size=64, num_charts=4, chart_size=4, hidden_size=256, depth=3, form="transition"),
    summary="From one chart of chart-autoencoder-mnist to another",
)
def chart_autoencoder(config: ChartAutoencoderConfig) -> ModelSpec:
    """A chart auto-encoder in one of its forms."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = sizes["batch"]
        if config.form == "reconstruct":
            x = rng.standard_normal((batch, config.data_size), dtype=np.float32)
            if config.data_size == 3:  # the paper's first example: a sphere
                x /= np.linalg.norm(x, axis=1, keepdims=True)
            return {"x": torch.from_numpy(x)}
        names = ("chart",) if config.form == "decode" else ("source", "target")
        given = {"coordinates": torch.from_numpy(rng.random((batch, config.chart_size), dtype=np.float32))}
        return given | {name: torch.from_numpy(rng.integers(0, config.num_charts, batch)) for name in names}

    names = {"reconstruct": ("x",), "decode": ("coordinates", "chart"), "transition": ("coordinates", "source", "target")}
    outputs = {
        "reconstruct": ("reconstruction", "probabilities", "chart", "coordinates"),
        "decode": ("points",),
        "transition": ("coordinates_in_target",),
    }
    return ModelSpec(
        build=lambda: _MODULES[config.form](config).eval(),
        inputs=inputs,
        sizes={"batch": 8},
        dynamic={name: {0: "batch"} for name in names[config.form]},
        ranges={"batch": SizeRange(1, 8, 1024)},
        outputs=outputs[config.form],
        # One point's coordinates are a few numbers, which may lie so near each other that no error is small beside their range. They are in
        # the unit cube: the usual bounds, of its side.
        tolerances={"fp32": Tolerance(atol=1e-5, rtol=0.0), "fp16": Tolerance(atol=1e-2, rtol=0.0), "bf16": Tolerance(atol=1e-1, rtol=0.0)}
        if config.form == "transition"
        else {},
        source="Schonsheck, Chen & Lai, Chart Auto-Encoders for Manifold Structured Data, arXiv:1912.10094",
        analyses=(
            Analysis("constraint", outputs=("probabilities",)),
            Analysis("entropy", outputs=("chart",), settings={"size": config.num_charts, "agreement": 0.99}),
            Analysis("betti", outputs=("reconstruction",)),
        )
        if config.form == "reconstruct"
        else (),
    )
