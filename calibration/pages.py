"""Reads many arrays in the order in which they are needed, holding no more at a time than a budget allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

K = TypeVar("K", bound=Hashable)
Array = np.ndarray[Any, Any]


class Pages(Generic[K]):
    """Arrays by key, read in groups: what is needed next, as far as the budget goes.

    Args:
        read: Reads some keys at once.
        order: The keys in the order in which they will be taken, a key as often as it will be taken.
        sizes: The size of each key's array, bytes.
        budget: The bytes that may be held. An array that is larger is read alone.

    Attributes:
        reads: How often `read` was called.
    """

    def __init__(self, read: Callable[[Sequence[K]], Mapping[K, Array]], order: Sequence[K], sizes: Mapping[K, int], budget: int) -> None:
        self._read, self._order, self._sizes, self._budget = read, list(order), sizes, budget
        self._left = Counter(self._order)
        self._next = 0
        self._held: dict[K, Array] = {}
        self.reads = 0

    def take(self, key: K) -> Array:
        """The array of a key, to be used before the next call."""
        while self._next < len(self._order) and self._order[self._next] != key:
            self._done(self._order[self._next])  # was not taken after all
        if key not in self._held:
            self._fetch(key)
        array = self._held[key]
        if self._next < len(self._order):
            self._done(key)
        return array

    def _done(self, key: K) -> None:
        self._next += 1
        self._left[key] -= 1
        if self._left[key] <= 0:
            self._held.pop(key, None)

    def _fetch(self, key: K) -> None:
        group, total = {key}, self._sizes[key]
        for other in self._order[self._next :]:
            if other in group:
                continue
            total += self._sizes[other]
            if total > self._budget:
                break
            group.add(other)
        # What is held and comes later than this group is read again then.
        self._held = {k: a for k, a in self._held.items() if k in group}
        missing = [k for k in dict.fromkeys((key, *self._order[self._next :])) if k in group and k not in self._held]
        self._held.update(self._read(missing))
        self.reads += 1
