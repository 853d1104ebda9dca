"""The topology of a cloud of points: Betti numbers from persistent homology, and whether two clouds have the same.

Betti number k counts what a shape has of dimension k: pieces, loops, cavities. Of a finite sample they are read off its persistence diagram
(Edelsbrunner, Letscher and Zomorodian, 2002): balls grow around the points, and each feature is born at one diameter of the balls and dies
at another. Features that the shape has live long; those of the sampling die soon after their birth.

What counts as long is decided like this, and can be set:

- a piece (dimension 0): it stays apart until the balls have a diameter of more than `separation` times the cloud's diameter, and of
  `ratios[0]` times that at which nine tenths of the points have joined others;
- a loop or cavity: it dies at `ratios[1]` or `ratios[2]` times the scale of its birth or later (ratios of death to birth are what noise of
  any scale and density distributes alike: Bobrowski and Skraba, "A universal null-distribution for topological data analysis", 2023), and
  lives for more than `separation` times the cloud's diameter.

For points of 2 and 3 numbers the complex is the alpha complex, for others Vietoris-Rips on at most `landmarks` points, each the farthest
from those before. Both are measured by the diameter of the balls, which are the lengths of a Rips complex's edges.

A point far from all others is a piece of its own: with latents that are normally distributed that happens by chance, in the reference and
in the artifact alike.

gudhi computes the persistence; it is imported when it is needed, and is in the extra `analysis`: `pip install 'isthmus[analysis]'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..exporter.errors import MachineError

Array = np.ndarray[Any, Any]

RATIOS = (4.0, 3.5, 2.0)
"""For pieces, loops and cavities, and the last also beyond. Chosen on uniform samples of discs, circles, spheres and tori of some hundred
points; chance makes shorter features, the higher the dimension."""
SEPARATION = 0.1
LANDMARKS = 200
_NOTHING = 1e-300
"""gudhi gives the smallest positive numbers for equal diagrams."""


@dataclass(frozen=True)
class Topology:
    """What persistent homology says of a cloud.

    Attributes:
        betti: Betti numbers of dimension 0, 1, ...
        intervals: For each dimension birth and death of every feature, (k, 2), by descending length; a death may be infinite.
        diameter: The largest distance of two points along one axis, which is what lengths are compared with.
    """

    betti: tuple[int, ...]
    intervals: tuple[Array, ...]
    diameter: float


@dataclass(frozen=True)
class TopologyComparison:
    """Two clouds.

    Attributes:
        reference: Of PyTorch's latents.
        artifact: Of the artifact's.
        distances: For each dimension the bottleneck distance of the two persistence diagrams, relative to the reference's diameter.
    """

    reference: Topology
    artifact: Topology
    distances: tuple[float, ...]

    @property
    def agree(self) -> bool:
        """Whether all Betti numbers are the same."""
        return self.reference.betti == self.artifact.betti


def topology(
    points: Array, *, max_dimension: int = 1, ratios: Sequence[float] = RATIOS, separation: float = SEPARATION, landmarks: int = LANDMARKS
) -> Topology:
    """Betti numbers and persistence of a cloud of points.

    Args:
        points: (N, d), finite floats, N at least 1; more axes after the first are flattened.
        max_dimension: The highest dimension; Betti numbers from d on are zero.
        ratios: See the module's text.
        separation: See the module's text.
        landmarks: See the module's text; without effect for d of 2 and 3.

    Raises:
        MachineError: gudhi is not installed.
        ValueError: There are no points, or not all of them are finite.
    """
    gudhi = _gudhi()
    cloud = np.asarray(points, np.float64)
    if cloud.ndim < 1 or not len(cloud):
        raise ValueError(f"got an array of shape {cloud.shape}, expected at least one point")
    cloud = cloud.reshape(len(cloud), -1)
    if not np.isfinite(cloud).all():
        raise ValueError("got points that are not finite")
    diameter = float(np.ptp(cloud, axis=0).max())
    flat = _is_flat(cloud)
    if flat:
        tree = gudhi.AlphaComplex(points=cloud).create_simplex_tree()
    else:
        cloud = cloud[_farthest(cloud, landmarks)]
        tree = gudhi.RipsComplex(points=cloud).create_simplex_tree(max_dimension=max_dimension + 1)
    tree.compute_persistence(homology_coeff_field=2, min_persistence=0.0)
    intervals = []
    for dimension in range(max_dimension + 1):
        found = np.asarray(tree.persistence_intervals_in_dimension(dimension), np.float64).reshape(-1, 2)
        if flat:
            found = 2 * np.sqrt(np.maximum(found, 0))  # alpha complexes are filtered by squared radii
        intervals.append(found[np.argsort(found[:, 0] - found[:, 1], kind="stable")])
    deaths = intervals[0][:, 1]
    joined = np.quantile(deaths[np.isfinite(deaths)], 0.9, method="lower") if np.isfinite(deaths).any() else 0.0
    betti = [max(1, int(((deaths > separation * diameter) & (deaths >= ratios[0] * joined)).sum()))]
    for dimension, found in enumerate(intervals[1:], 1):
        ratio = ratios[min(dimension, len(ratios) - 1)]
        long = (found[:, 1] >= ratio * found[:, 0]) & (found[:, 1] - found[:, 0] > separation * diameter)
        betti.append(int(long.sum()))
    return Topology(tuple(betti), tuple(intervals), diameter)


def compare_topology(reference: Array, artifact: Array, **settings: Any) -> TopologyComparison:
    """Both clouds' topology and how far their persistence diagrams are apart. Clouds of as many points are compared point by point: their
    landmarks are the reference's.

    Args:
        reference: PyTorch's latents, (N, d).
        artifact: The artifact's, (M, d).
        settings: Those of `topology`.

    Raises:
        MachineError: gudhi is not installed.
        ValueError: See `topology`.
    """
    gudhi = _gudhi()
    cloud = np.asarray(reference, np.float64).reshape(len(reference), -1)
    if len(reference) == len(artifact) and not _is_flat(cloud):  # the same landmarks, however near another choice is
        chosen = _farthest(cloud, settings.get("landmarks", LANDMARKS))
        reference, artifact = reference[chosen], artifact[chosen]
    first, second = topology(reference, **settings), topology(artifact, **settings)
    distances = [float(gudhi.bottleneck_distance(a, b)) for a, b in zip(first.intervals, second.intervals, strict=True)]
    relative = [d / first.diameter if first.diameter else d for d in distances]
    return TopologyComparison(first, second, tuple(d if d > _NOTHING else 0.0 for d in relative))


def _is_flat(cloud: Array) -> bool:
    """Whether the alpha complex is taken: few simplices there, and gudhi has none for points of one number."""
    return cloud.shape[1] in (2, 3)


def _gudhi() -> Any:
    try:
        import gudhi
    except ImportError as error:
        raise MachineError(
            "persistent homology needs the package gudhi, which is not installed", hint="pip install 'isthmus[analysis]'"
        ) from error
    return gudhi


def _farthest(cloud: Array, count: int) -> list[int]:
    """At most `count` points by their places, the first and then always the one that is farthest from those chosen."""
    if len(cloud) <= count:
        return list(range(len(cloud)))
    chosen = [0]
    distance = np.linalg.norm(cloud - cloud[0], axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(cloud - cloud[chosen[-1]], axis=1))
    return chosen
