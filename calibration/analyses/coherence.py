"""Whether inputs that the model cannot tell apart stay so in the artifact."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ...exporter.spec import Analysis, Arrays
from ..analysis import Analyser, Figure, Seen, register_analysis


def _reversed_rows(arrays: Arrays) -> Arrays:
    return {name: np.ascontiguousarray(array[::-1]) if array.ndim else array for name, array in arrays.items()}


@register_analysis("coherence", summary="equivalent inputs give equivalent outputs")
class Coherence(Analyser):
    """Myhill and Nerode's criterion, asked of an artifact: what is equivalent to the model is equivalent to it.

    Two histories are one state of an automaton when no continuation tells them apart (Nerode, Proc. AMS 9, 1958); Vafa et al.
    (arXiv:2406.03689) ask the same of generative models. Settings: `transform`, from the inputs of a call to those of an equivalent one,
    and `back`, from the outputs of that call to what they ought to be without it. The default are the rows of a batch in reversed order,
    which no row may notice, and which suits every model with a batch.

    `difference` is the largest |difference| between the outputs of equivalent inputs over their range; infinite where one of them is no
    finite number. The artifact's may be as far from PyTorch's own as rounding explains (1e-5 in float32, 1e-2 in half precision): a model
    whose rows notice each other is one whose artifact's have to as well.
    """

    def figures(self, request: Analysis, seen: Seen) -> Mapping[str, Figure]:
        """See `Analyser.figures`."""
        transform, back = request.settings.get("transform", _reversed_rows), request.settings.get("back", _reversed_rows)
        worst = 0.0
        for inputs, outputs in zip(seen.inputs, seen.outputs, strict=True):
            again = back(seen.run(transform(inputs)))
            for name in request.outputs or outputs:
                a, b = outputs[name].astype(np.float64), again[name].astype(np.float64)
                spread = max(float(np.ptp(a)), 1e-12) if a.size else 1.0
                difference = float(np.abs(a - b).max(initial=0.0)) / spread
                worst = max(worst, difference if math.isfinite(difference) else math.inf)  # max() passes over nan
        return {"difference": Figure(worst, allowance=1e-5 if seen.fine else 1e-2)}
