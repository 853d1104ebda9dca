"""How much the codes of a tokenizer say, and whether the artifact gives the same codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...exporter.spec import Analysis
from ..analysis import Analyser, Figure, Seen, register_analysis


@register_analysis("entropy", summary="Shannon entropy, use and agreement of codes")
class Entropy(Analyser):
    """Of one integer output, the codes. Settings: `size`, the number of codes that there are; `axis`, along which the codes are those of
    separate codebooks, whose entropies are separate figures; `agreement` (1.0), the share of equal codes that half precision has to reach,
    for codes that are chosen from what a network has computed.

    The entropy is the plug-in estimate with the correction of Miller and Madow (1955): (K - 1) / 2N nats are added for K codes seen in N,
    without which it is too small. `used` is the share of the codes that were seen; `agreement` the share of the codes that are PyTorch's,
    and has to be 1 but for that.
    """

    def figures(self, request: Analysis, seen: Seen) -> Mapping[str, Figure]:
        """See `Analyser.figures`."""
        (name,) = request.outputs
        size = int(request.settings["size"])
        codes = seen.output(name)
        if codes.size and not 0 <= codes.min() <= codes.max() < size:
            raise ValueError(f"{name} holds codes from {codes.min()} to {codes.max()}, expected 0 to {size - 1}")
        least = 1.0 if seen.fine else float(request.settings.get("agreement", 1.0))
        agreement = Figure(float((codes == seen.expected(name)).mean()), allowance=1 - least)
        if "axis" not in request.settings:
            return {**_of(codes, size), "agreement": agreement}
        found: dict[str, Figure] = {}
        for stage, part in enumerate(np.moveaxis(codes, int(request.settings["axis"]), 0), 1):
            found |= {f"{figure}, {stage}": value for figure, value in _of(part, size).items()}
        return {**found, "agreement": agreement}


def _of(codes: np.ndarray[Any, Any], size: int) -> dict[str, Figure]:
    counts = np.unique(codes, return_counts=True)[1]
    shares = counts / codes.size
    entropy = -(shares * np.log2(shares)).sum() + (len(counts) - 1) / (2 * codes.size * np.log(2))
    return {"entropy": Figure(float(min(entropy, np.log2(size))), "bits"), "used": Figure(len(counts) / size)}
