"""Entropic optimal transport by Sinkhorn's iterations, in the log domain (Cuturi, arXiv:1306.0895).

Between clouds x (n points, weights a) and y (m points, weights b), with cost C_ij and regularisation eps, the plan is
P_ij = exp(u_i + v_j - C_ij / eps), and each iteration makes its rows, then its columns have the right sums:

    u = log a - logsumexp_j(v_j - C_ij / eps),    v = log b - logsumexp_i(u_i - C_ij / eps)

A fixed number of them, unrolled, from v = 0. The last one fixes the columns: they sum to b as exactly as the arithmetic allows, and the
rows to a as far as the iterations have converged. The graph returns the plan, what each point of x pays, sum_j P_ij C_ij (their sum is the
cost of the plan, neither the regularised objective nor its square root), and the potentials f = eps u and g = eps v.

There is nothing to learn here, and the model has no weights; both clouds may have any number of points. Weights a and b have to be
positive: take points without mass out, as the paper does.

A popular sketch multiplies by exp(-C / eps) itself, which in float32 is 0 from C = 104 eps on, and in float16 from 17 eps; then it
divides by zero. It also stops on a comparison of values; here the number of iterations is fixed. `sinkhorn-mnist` is the paper's
experiment: histograms of 20 x 20 pixels, Euclidean distances on the grid, lambda = 9 over their median (of the unit square: eps = 0.0567),
20 iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..exporter.spec import Analysis, ModelSpec, SizeRange, Tolerance, register_model


@dataclass(frozen=True)
class SinkhornConfig:
    """Settings of Sinkhorn's iterations.

    Attributes:
        points: n, points of the first cloud that an artifact is tuned for; others may be given.
        targets: m, points of the second, likewise.
        dimensions: Coordinates of a point.
        cost: `sqeuclidean` or `euclidean`.
        epsilon: Strength of the regularisation, in the unit of the cost.
        iterations: Number of iterations, of a row and a column step each.
    """

    points: int = 12
    targets: int = 16
    dimensions: int = 2
    cost: Literal["sqeuclidean", "euclidean"] = "sqeuclidean"
    epsilon: float = 0.1
    iterations: int = 10

    def __post_init__(self) -> None:
        for name in ("points", "targets", "dimensions", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.cost not in ("sqeuclidean", "euclidean"):
            raise ValueError(f"cost must be sqeuclidean or euclidean, got {self.cost!r}")
        if self.epsilon <= 0:
            raise ValueError(f"epsilon must be above 0, got {self.epsilon}")


class Sinkhorn(nn.Module):
    """Sinkhorn's iterations; no weights."""

    def __init__(self, config: SinkhornConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The plan between two clouds.

        Args:
            x: Points (B, n, dimensions).
            y: Points (B, m, dimensions).
            a: Their weights (B, n), positive, summing to 1.
            b: Their weights (B, m), positive, summing to 1.

        Returns:
            The plan (B, n, m), what each point of x pays (B, n), and the potentials f (B, n) and g (B, m).
        """
        epsilon = self.config.epsilon
        # Differences, not |x|^2 + |y|^2 - 2 x y: small distances between far points would be lost.
        squared = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(dim=3)
        cost = squared if self.config.cost == "sqeuclidean" else torch.sqrt(squared)
        kernel = cost * (-1 / epsilon)
        log_a, log_b = torch.log(a).unsqueeze(2), torch.log(b).unsqueeze(1)
        v = torch.zeros_like(log_b)
        for _ in range(self.config.iterations):
            u = log_a - torch.logsumexp(kernel + v, dim=2, keepdim=True)
            v = log_b - torch.logsumexp(kernel + u, dim=1, keepdim=True)
        plan = torch.exp(kernel + u + v)
        return plan, (plan * cost).sum(dim=2), epsilon * u.squeeze(2), epsilon * v.squeeze(1)


@register_model("sinkhorn-tiny", SinkhornConfig(), summary="Sinkhorn transport of 12 to 16 points in 10 iterations, for trying")
@register_model(
    "sinkhorn-mnist",
    SinkhornConfig(points=400, targets=400, cost="euclidean", epsilon=0.0567, iterations=20),
    summary="Sinkhorn transport between two pictures of 20 x 20, 20 iterations",
)
def sinkhorn(config: SinkhornConfig) -> ModelSpec:
    """Sinkhorn transport."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch, n, m, d = sizes["batch"], sizes["points"], sizes["targets"], config.dimensions
        clouds = {"x": rng.random((batch, n, d), dtype="float32"), "y": rng.random((batch, m, d), dtype="float32")}
        weights = {"a": rng.random((batch, n), dtype="float32") + 0.5, "b": rng.random((batch, m), dtype="float32") + 0.5}
        weights = {name: w / w.sum(axis=1, keepdims=True) for name, w in weights.items()}
        return {name: torch.from_numpy(value) for name, value in (clouds | weights).items()}

    smaller, larger = sorted((config.points, config.targets))
    return ModelSpec(
        build=lambda: Sinkhorn(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "points": config.points, "targets": config.targets},
        dynamic={name: {0: "batch", 1: "points" if name in "xa" else "targets"} for name in ("x", "y", "a", "b")},
        # One range for both, so that an artifact is also verified with one of them changed and not the other. From 4 on: errors are judged
        # beside an output's range, and what two points pay may be nearly the same.
        ranges={
            "batch": SizeRange(1, 2, 16),
            **dict.fromkeys(("points", "targets"), SizeRange(min(4, smaller), larger, max(1024, larger))),
        },
        outputs=("plan", "costs", "f", "g"),
        # Exponents reach C / eps = 20, of which half precision keeps 2^-6 where a target has no islands of float32.
        tolerances={"fp16": Tolerance(min_psnr=50.0, max_relative=1e-2)},
        source="Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, arXiv:1306.0895",
        analyses=(
            Analysis("constraint", inputs=("a",), outputs=("plan",), settings={"axis": 2}),  # not before the iterations have converged
            Analysis("constraint", inputs=("b",), outputs=("plan",), settings={"axis": 1}),
        ),
    )
