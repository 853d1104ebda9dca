"""What a stochastic encoder keeps, and what of it reaches the output: the two sides of the information bottleneck."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...exporter.spec import Analysis
from ..analysis import Analyser, Figure, Seen, register_analysis
from .mutual_information import sliced_information


@register_analysis("information-bottleneck", summary="rate of a stochastic encoder, and what of it reaches the output")
class InformationBottleneck(Analyser):
    """Of three outputs: mean and log variance of a Gaussian code, and what is decoded from it.

    `rate` is the mean of KL(q(z|x) || N(0, I)), an upper bound of I(X; Z) (Alemi et al., arXiv:1612.00410); `relevance` the sliced mutual
    information between the means and the decoded rows.
    """

    needs = ("sklearn",)

    def figures(self, request: Analysis, seen: Seen) -> Mapping[str, Figure]:
        """See `Analyser.figures`."""
        mean, log_variance, decoded = (seen.output(name).astype(np.float64) for name in request.outputs)
        divergence = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).reshape(len(mean), -1).sum(1)
        rate = float(divergence.mean() / np.log(2))
        relevance = sliced_information(mean, decoded)
        return {
            "rate": Figure(rate, "bits", allowance=1e-4 * rate if seen.fine else 1e-2 * rate),
            "relevance": Figure(relevance, "bits", allowance=max(0.05, 0.05 * relevance)),
        }
