"""Whether what has to sum to a number still does: attention weights, transport plans, probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...exporter.spec import Analysis
from ..analysis import Analyser, Figure, Seen, register_analysis


@register_analysis("constraint", summary="violation of a sum that a model keeps")
class Constraint(Analyser):
    """Of one output. Settings: `axis` over which it sums (-1), and to what (`value`, 1.0; an input, where the request names one);
    `negative` (False) allows negative entries.

    `violation` is the largest |sum - value|, `negative` the largest -entry: both are 0 in exact arithmetic for most models. The artifact's
    may differ from PyTorch's by the rounding of the precision, 1e-5 in float32 and 5e-3 in half precision.
    """

    def figures(self, request: Analysis, seen: Seen) -> Mapping[str, Figure]:
        """See `Analyser.figures`."""
        (name,) = request.outputs
        values = seen.output(name).astype(np.float64)
        sums = values.sum(int(request.settings.get("axis", -1)))
        wanted = seen.input(*request.inputs) if request.inputs else float(request.settings.get("value", 1.0))
        allowance = 1e-5 if seen.fine else 5e-3
        found = {"violation": Figure(float(np.abs(sums - wanted).max()), allowance=allowance)}
        if not request.settings.get("negative", False):
            found["negative"] = Figure(float(max(0.0, -values.min())), allowance=allowance)
        return found
