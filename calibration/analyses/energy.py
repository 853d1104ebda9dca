"""Whether dynamics that conserve an energy still do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...exporter.spec import Analysis
from ..analysis import Analyser, Figure, Seen, register_analysis


@register_analysis("energy", summary="drift of a conserved energy along the steps")
class Energy(Analyser):
    """Of one output, the energies (B, steps, …); what is on further axes, such as kinetic and potential, is summed.

    `drift` is the mean over rows of max_t |H_t - H_0|, over the root mean square of H_0. What leapfrog leaves is PyTorch's own, and the
    artifact's has to be equal to it: but for 1e-5 in float32, where the integrator's steps are summed up with errors of some 1e-6, and for
    3e-3 in half precision, whose numbers are 1e-3 apart: a drift below that is not seen there. The worst row may have twice that, because
    its energy, which is what rounding is relative to, can be larger than the mean.
    """

    def figures(self, request: Analysis, seen: Seen) -> Mapping[str, Figure]:
        """See `Analyser.figures`."""
        (name,) = request.outputs
        values = seen.output(name).astype(np.float64)
        energies = values.reshape(*values.shape[:2], -1).sum(-1)
        scale = max(float(np.sqrt((energies[..., 0] ** 2).mean())), 1e-12)
        moved = np.abs(energies - energies[..., :1]).max(-1) / scale
        allowance = 1e-5 if seen.fine else 3e-3
        return {
            "drift": Figure(float(moved.mean()), allowance=allowance),
            "worst drift": Figure(float(moved.max()), allowance=2 * allowance),
        }
