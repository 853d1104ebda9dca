"""Whether dynamics that conserve an energy still do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...exporter.spec import Analysis
from ..analysis import Analyser, Figure, Seen, register_analysis


@register_analysis("energy", summary="drift of a conserved energy along the steps")
class Energy(Analyser):
    """Of one output, the energies (B, steps, …); what is on further axes, such as kinetic and potential, is summed.

    `drift` is the mean over rows of max_t |H_t - H_0|, over the root mean square of H_0: what leapfrog leaves is PyTorch's own, and the
    artifact's has to be equal to it within the rounding of its precision, 1e-4 in float32 and 1e-2 in half precision.
    """

    def figures(self, request: Analysis, seen: Seen) -> Mapping[str, Figure]:
        """See `Analyser.figures`."""
        (name,) = request.outputs
        values = seen.output(name).astype(np.float64)
        energies = values.reshape(*values.shape[:2], -1).sum(-1)
        scale = max(float(np.sqrt((energies[..., 0] ** 2).mean())), 1e-12)
        moved = np.abs(energies - energies[..., :1]).max(-1) / scale
        allowance = 1e-4 if seen.fine else 1e-2
        return {
            "drift": Figure(float(moved.mean()), allowance=allowance),
            "worst drift": Figure(float(moved.max()), allowance=2 * allowance),
        }
