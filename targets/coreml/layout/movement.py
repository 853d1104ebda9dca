"""What moves elements and computes nothing: any chain of reshapes and transposes, as one value that can be composed, inverted and undone.

A movement splits the axes of its source into factors, permutes them and joins them to the axes of its target. Chains such as
view-permute-unbind in front of an attention and transpose-view behind it compose to one movement; a layout's entry composed with its exit
is the identity, and nothing is left of either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]

_RANK = 5
"""Core ML's tensors have so many axes at most."""


@dataclass(frozen=True)
class Axes:
    """A movement whose factors are cut so finely that every axis of source and target is a product of them.

    Attributes:
        sizes: The size of each factor; none is 1.
        source: For each axis of the source, the factors that it consists of, in row-major order.
        target: The same of the target.
    """

    sizes: Shape
    source: tuple[Shape, ...]
    target: tuple[Shape, ...]

    def same(self, axis: int) -> int | None:
        """The source's axis that the target's axis is; None when it is no whole axis there, or of size 1."""
        return self.source.index(self.target[axis]) if self.target[axis] and self.target[axis] in self.source else None

    def leading(self, axis: int) -> tuple[int, int] | None:
        """The source's axis whose outer part the target's axis is, and the size of the part inside of it; None when there is none.

        Cutting the target along its axis is then cutting the source along that one, in blocks of the inner part.
        """
        factors = self.target[axis]
        for place, held in enumerate(self.source):
            if factors and held[: len(factors)] == factors:
                return place, math.prod(self.sizes[f] for f in held[len(factors) :])
        return None

    def resized(self, axis: int, size: int) -> Movement:
        """The movement when the target's axis has another size: its factors become one, which must be neighbours in the source."""
        first, *others = self.target[axis]
        sizes = [1 if f in others else size if f == first else n for f, n in enumerate(self.sizes)]
        return _joined(sizes, self.source, self.target)


@dataclass(frozen=True)
class Movement:
    """See the module's text. Equal movements are equal values: `factors` is the shortest list possible.

    Attributes:
        source: The shape that it takes.
        factors: Sizes, the source read in row-major order.
        order: The permutation of the factors.
        target: The shape that it gives.
    """

    source: Shape
    factors: Shape
    order: Shape
    target: Shape

    @classmethod
    def identity(cls, shape: Sequence[int]) -> Movement:
        """Nothing moves."""
        return cls.view(shape, shape)

    @classmethod
    def view(cls, source: Sequence[int], target: Sequence[int]) -> Movement:
        """A reshape."""
        assert math.prod(source) == math.prod(target), f"{tuple(source)} and {tuple(target)} have other numbers of elements"
        return _merged(tuple(source), (math.prod(source),), (0,), tuple(target))

    @classmethod
    def permute(cls, source: Sequence[int], order: Sequence[int]) -> Movement:
        """A transpose: axis i of the target is axis order[i] of the source."""
        places = tuple(axis % len(source) for axis in order)
        return _merged(tuple(source), tuple(source), places, tuple(source[axis] for axis in places))

    @property
    def is_identity(self) -> bool:
        """Nothing is to be done."""
        return self.source == self.target and self.is_view

    @property
    def is_view(self) -> bool:
        """A reshape is enough: the elements keep their order in memory."""
        return self.order == tuple(range(len(self.order)))

    def inverse(self) -> Movement:
        """Back to the source."""
        back = tuple(self.order.index(i) for i in range(len(self.order)))
        return Movement(self.target, tuple(self.factors[i] for i in self.order), back, self.source)

    def then(self, other: Movement) -> Movement | None:
        """This one and the other after it, as one; None when their factors have no common refinement, such as 2 x 3 and 3 x 2."""
        assert self.target == other.source, f"got {other.source} after {self.target}"
        common = _common([self.factors[i] for i in self.order], other.factors)
        if common is None:
            return None
        atoms = range(len(common))
        first = [atom for factor in range(len(self.order)) for atom in atoms if self.order[common[atom][1]] == factor]
        last = [atom for factor in other.order for atom in atoms if common[atom][2] == factor]
        return _merged(self.source, tuple(common[a][0] for a in first), tuple(first.index(a) for a in last), other.target)

    def axes(self) -> Axes | None:
        """See `Axes`; None when the axes of source and target have no common factors."""
        moved = [self.factors[i] for i in self.order]
        before, after = _common(self.source, self.factors), _common(moved, self.target)
        if before is None or after is None:
            return None
        sizes: list[int] = []
        source: list[list[int]] = [[] for _ in self.source]
        held: list[list[tuple[int, int]]] = []  # for each factor its atoms, with their place in the factor's cut by the target
        for place, factor in enumerate(self.factors):
            inner = [(size, axis) for size, axis, i in before if i == place]
            outer = [size for size, i, _ in after if self.order[i] == place]
            cut = _common([size for size, _ in inner], outer)
            if cut is None or math.prod(outer) != factor:
                return None
            held.append([])
            for size, i, j in cut:
                source[inner[i][1]].append(len(sizes))
                held[-1].append((len(sizes), j))
                sizes.append(size)
        target: list[list[int]] = [[] for _ in self.target]
        for i, place in enumerate(self.order):
            joined = [axis for _, k, axis in after if k == i]
            for atom, j in held[place]:
                target[joined[j]].append(atom)
        return Axes(tuple(sizes), tuple(map(tuple, source)), tuple(map(tuple, target)))

    def pulled(self, shape: Sequence[int]) -> Movement | None:
        """The movement to the source's axes of a tensor that broadcasts with the target.

        Args:
            shape: The tensor's; each axis, counted from the last, is the target's or 1.

        Returns:
            A movement from `shape` to a shape that broadcasts with `source` in the same way; None when there is none.
        """
        full = (1,) * (len(self.target) - len(shape)) + tuple(shape)
        axes = self.axes()
        if axes is None or len(full) != len(self.target):
            return None
        kept = [f for axis, size in enumerate(full) if size != 1 for f in axes.target[axis]]
        if any(size not in (1, n) for size, n in zip(full, self.target, strict=True)):
            return None
        if any(0 < sum(f in kept for f in held) < len(held) for held in axes.source):
            return None  # a part of an axis does not broadcast
        sizes = [n if f in kept else 1 for f, n in enumerate(axes.sizes)]
        moved = _joined(sizes, axes.source, axes.target).inverse()
        return Movement.view(shape, full).then(moved)

    def steps(self) -> Iterator[tuple[str, Shape]]:
        """What has to be done: ("view", shape) and ("permute", order), at most three, of the lowest rank that keeps axes apart."""
        if self.is_identity:
            return
        if self.is_view:
            yield "view", self.target
            return
        direct = self._direct()
        if direct is not None:
            yield "permute", direct
            return
        factors, order = self._readable()
        if factors != self.source:
            yield "view", factors
        yield "permute", order
        moved = tuple(factors[i] for i in order)
        if moved != self.target:
            yield "view", self.target

    def _direct(self) -> Shape | None:
        """The order, when the target's axes are the source's in another one: axes of size 1 count as well."""
        axes = self.axes()
        if axes is None or sorted(axes.source) != sorted(axes.target):
            return None
        ones = iter([i for i, held in enumerate(axes.source) if not held])
        return tuple(axes.source.index(held) if held else next(ones) for held in axes.target)

    def _readable(self) -> tuple[Shape, Shape]:
        """Factors that do not mix axes which both shapes keep apart, such as the batch and the heads."""
        axes = self.axes()
        factors, order = self.factors, self.order
        if axes is not None:
            owner = {f: (i, j) for i, s in enumerate(axes.source) for j, t in enumerate(axes.target) for f in s if f in t}
            flat = [f for held in axes.target for f in held]
            runs: list[list[int]] = []
            for f in range(len(axes.sizes)):
                if runs and owner[f] == owner[f - 1] and flat.index(f) == flat.index(f - 1) + 1:
                    runs[-1].append(f)
                else:
                    runs.append([f])
            if len(runs) <= _RANK:
                factors = tuple(math.prod(axes.sizes[f] for f in run) for run in runs)
                order = tuple(i for f in flat for i, run in enumerate(runs) if run[0] == f)
        if self.source[:1] == self.target[:1] == (1,) and len(factors) < _RANK:  # a batch of one stays an axis
            factors, order = (1, *factors), (0, *(i + 1 for i in order))
        return factors, order


def _common(left: Sequence[int], right: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """The common refinement of two lists of factors of one number: (size, place in left, place in right); None when there is none."""
    found: list[tuple[int, int, int]] = []
    i, j = len(left) - 1, len(right) - 1
    a, b = (left[i] if left else 1), (right[j] if right else 1)
    while True:
        while a == 1 and i > 0:
            i -= 1
            a = left[i]
        while b == 1 and j > 0:
            j -= 1
            b = right[j]
        if a == 1 or b == 1:
            return found[::-1] if a == b else None
        size = min(a, b)
        if max(a, b) % size:
            return None
        found.append((size, i, j))
        a, b = a // size, b // size


def _joined(sizes: Sequence[int], source: Sequence[Shape], target: Sequence[Shape]) -> Movement:
    """The movement of factors with these sizes, listed in the source's order."""
    order = tuple(f for held in target for f in held)
    shapes = [tuple(math.prod(sizes[f] for f in held) for held in side) for side in (source, target)]
    return _merged(shapes[0], tuple(sizes), order, shapes[1])


def _merged(source: Shape, factors: Shape, order: Shape, target: Shape) -> Movement:
    """Without factors of 1, and with neighbours that stay neighbours as one factor."""
    kept = [i for i in order if factors[i] != 1]
    ranks = {place: rank for rank, place in enumerate(sorted(kept))}
    sizes = [factors[place] for place in sorted(kept)]
    runs: list[list[int]] = []
    for place in (ranks[i] for i in kept):
        if runs and runs[-1][-1] + 1 == place:
            runs[-1].append(place)
        else:
            runs.append([place])
    starts = sorted(run[0] for run in runs)
    joined = {run[0]: math.prod(sizes[i] for i in run) for run in runs}
    return Movement(source, tuple(joined[s] for s in starts), tuple(starts.index(run[0]) for run in runs), target)
