"""Whether latents keep their topology: as many pieces, loops and cavities as PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping

from ...exporter.spec import Analysis
from ..analysis import Analyser, Figure, Seen, register_analysis
from ..topology import compare_topology


@register_analysis("betti", summary="Betti numbers of latents, from persistent homology")
class Betti(Analyser):
    """Of one output, whose rows are a cloud of points. Setting `max_dimension` (1): the highest dimension that is looked at.

    `betti 0`, `betti 1`, … count pieces, loops, …, and have to be PyTorch's. `moved 0`, … are the bottleneck distances of the persistence
    diagrams from PyTorch's over the diameter of its cloud: how far features moved that are too short to be counted. They are at most twice
    the largest distance by which a point moved (Cohen-Steiner, Edelsbrunner and Harer, 2007), and may be 1e-4 in float32 and 2e-2 in half
    precision.
    """

    needs = ("gudhi",)

    def figures(self, request: Analysis, seen: Seen) -> Mapping[str, Figure]:
        """See `Analyser.figures`."""
        (name,) = request.outputs
        highest = int(request.settings.get("max_dimension", 1))
        found = compare_topology(seen.expected(name), seen.output(name), max_dimension=highest)
        figures = {f"betti {k}": Figure(float(number), allowance=0.0) for k, number in enumerate(found.artifact.betti)}
        allowance = 1e-4 if seen.fine else 2e-2
        return figures | {f"moved {k}": Figure(distance, allowance=allowance) for k, distance in enumerate(found.distances)}
