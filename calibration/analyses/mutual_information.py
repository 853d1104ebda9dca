"""How much an output says about an input, or about another output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...exporter.spec import Analysis
from ..analysis import Analyser, Figure, Seen, register_analysis

SLICES = 16
"""Pairs of random directions."""
VECTORS = 4096
"""As many are enough for 0.02 bits."""


def sliced_information(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], *, slices: int = SLICES, seed: int = 0) -> float:
    """Sliced mutual information (Goldfeld & Greenewald, arXiv:2110.05279): the mean information between random projections of both.

    Mutual information between vectors cannot be estimated from a few hundred of them; between their projections onto single directions
    it can, and is 0 exactly when they are independent. Each is estimated from nearest neighbours (Kraskov et al., PRE 69, 066138), by
    scikit-learn.

    Args:
        x: (N, …).
        y: (N, …).
        slices: Pairs of directions.
        seed: Draws the directions, so that both sides use the same.

    Returns:
        Bits.
    """
    from sklearn.feature_selection import mutual_info_regression

    rng = np.random.Generator(np.random.PCG64(seed))
    a, b = (value.reshape(len(value), -1).astype(np.float64) for value in (x, y))
    found = []
    for _ in range(slices):
        u, v = (value @ _direction(rng, value.shape[1]) for value in (a, b))
        found.append(mutual_info_regression(u[:, None], v, n_neighbors=3, random_state=seed)[0])
    return float(np.mean(found) / np.log(2))


def _direction(rng: np.random.Generator, size: int) -> np.ndarray[Any, Any]:
    direction = rng.standard_normal(size)
    result: np.ndarray[Any, Any] = direction / np.linalg.norm(direction)
    return result


@register_analysis("mutual-information", summary="sliced mutual information between an input and an output")
class MutualInformation(Analyser):
    """Between one input and one output, or between two outputs, in bits; see `sliced_information`. Setting `vectors` (False): what is
    observed are the vectors along the last axis, at most 4096 of them, and not whole rows.

    The artifact's may be 5 % or 0.05 bits away from PyTorch's, which is what the estimate itself varies by from draw to draw.
    """

    needs = ("sklearn",)

    def figures(self, request: Analysis, seen: Seen) -> Mapping[str, Figure]:
        """See `Analyser.figures`."""
        first, second = [*map(seen.input, request.inputs), *map(seen.output, request.outputs)]
        if request.settings.get("vectors", False):
            first, second = (value.reshape(-1, value.shape[-1]) for value in (first, second))
            step = -(-len(first) // VECTORS)
            first, second = first[::step], second[::step]
        bits = sliced_information(first, second)
        return {"sliced": Figure(bits, "bits", allowance=max(0.05, 0.05 * bits))}
