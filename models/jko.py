"""Wasserstein gradient flow by learned JKO steps (semi-dual JKO, Choi et al., arXiv:2402.05443; Jordan, Kinderlehrer & Otto 1998).

The JKO scheme descends a functional F of distributions in steps of size h: rho_{k+1} minimises W_2(rho, rho_k)^2 / (2 h) + F(rho). In the
semi-dual form each step is learned as a transport map T_k, with rho_{k+1} the image of rho_k, against a potential v_k:

    max over v, min over T:   E_x~rho_k [ |x - T(x)|^2 / (2 h) - v(T(x)) ] - E_y~data [ (F's convex conjugate) (-v(y)) ]

Inference is the composition of the learned maps, x_{k+1} = T_k(x_k) from noise x_0, and this is the graph: the samples after each step, the
potential v_k(x_{k+1}) of each sample (which tells its density under rho_{k+1} from that of the data), and the transport cost
|x_{k+1} - x_k|^2 / (2 h) that each step pays. The minimisation, all that the survey's sketch consists of, is training.

The maps are residual, T_k(x) = x + N_k(x), with N_k and v_k MLPs with SiLU, two hidden layers each. The paper's image models put the
authors' U-Net of 2 x 32 M parameters in their place; what is carried here is the scheme, at the size of its 2-D experiments. Inferred: the
residual form, the widths, and K = 10 with h = 0.1 of `jko-2d`. The paper's generator may also take an auxiliary noise; this one takes none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, Tolerance, register_model


@dataclass(frozen=True)
class JKOConfig:
    """Settings of a learned JKO scheme.

    Attributes:
        features: D, width of a sample.
        hidden: Width inside the maps and potentials.
        steps: K, number of steps.
        h: Size of a step.
    """

    features: int = 2
    hidden: int = 256
    steps: int = 10
    h: float = 0.1

    def __post_init__(self) -> None:
        for name in ("features", "hidden", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.h <= 0:
            raise ValueError(f"h must be above 0, got {self.h}")


def _mlp(features: int, hidden: int, out: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))
    for layer in layers:
        if isinstance(layer, nn.Linear):  # torch's default shrinks the signal at every layer
            nn.init.xavier_normal_(layer.weight, gain=1.2)
    return layers


class JKO(nn.Module):
    """The learned steps."""

    def __init__(self, config: JKOConfig) -> None:
        super().__init__()
        self.config = config
        self.maps = nn.ModuleList(_mlp(config.features, config.hidden, config.features) for _ in range(config.steps))
        self.potentials = nn.ModuleList(_mlp(config.features, config.hidden, 1) for _ in range(config.steps))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Follows the flow.

        Args:
            x: Samples of the noise, (B, D).

        Returns:
            Samples after 0, 1, … K steps (B, K + 1, D), the potentials (B, K), and the costs (B, K).
        """
        path, potentials, costs = [x], [], []
        for transport, potential in zip(self.maps, self.potentials, strict=True):
            change = transport(x)
            x = x + change
            path.append(x)
            potentials.append(potential(x))
            costs.append(change.square().sum(dim=1, keepdim=True) * (0.5 / self.config.h))
        return torch.stack(path, dim=1), torch.cat(potentials, dim=1), torch.cat(costs, dim=1)


@register_model("jko-tiny", JKOConfig(features=4, hidden=32, steps=3), summary="Learned JKO scheme of 3 steps, for trying")
@register_model("jko-2d", JKOConfig(), summary="Learned JKO scheme of 10 steps for 2-D data, 1.3 M parameters")
def jko(config: JKOConfig) -> ModelSpec:
    """A learned JKO scheme."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(rng.standard_normal((sizes["batch"], config.features), dtype="float32"))}

    return ModelSpec(
        build=lambda: JKO(config).eval(),
        inputs=inputs,
        sizes={"batch": 2},
        dynamic={"x": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 64)},
        outputs=("path", "potentials", "costs"),
        # Of one row there are K potentials, and the range that errors are compared with is that of a few numbers.
        tolerances={"fp16": Tolerance(min_psnr=50.0, max_relative=1e-2)},
        source="Choi, Choi & Kang, Scalable Wasserstein Gradient Flow for Generative Modeling through Unbalanced Optimal Transport, "
        "arXiv:2402.05443",
    )
