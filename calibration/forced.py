"""PyTorch on a program's values: before every call its arguments are replaced by these, and after it its results. See `diff`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .correspondence import UNCHANGED, Place, Spot
from .modules import Call, Output, Replace, Run, Visitor, by_end, key_of, tensors_of
from .pages import Pages
from .row import ROUNDOFF, Figures, Row, measured, measured_if_finite
from .verify import to_array

Array = np.ndarray[Any, Any]


class Forced(Visitor):
    """Puts the program's values in the place of PyTorch's, and measures what differs."""

    def __init__(
        self,
        calls: Sequence[Call],
        places: Mapping[str, Place],
        ours: Pages[str],
        theirs: Pages[Output],
        read: Callable[[Sequence[str]], Mapping[str, Array]],
        threshold: float,
    ) -> None:
        self._calls = {call.key: call for call in calls}
        self._places, self._ours, self._theirs, self._read = places, ours, theirs, read
        self._threshold = threshold
        self._events = 0
        self._running: dict[str, Run] = {}
        # Values that are not what PyTorch computed, by the tensor that they are: whoever reads that tensor reads them.
        self._wrong: dict[str, Spot] = {}
        self._hidden = {t.fingerprint: call.key for call in reversed(by_end(calls)) if _hidden(places[call.key]) for t in call.outputs}
        self.rows = {
            call.key: Row(call.key, call.kind, 0, nodes=tuple(map(str, places[call.key].steps)), reason=places[call.key].reason)
            for call in calls
        }

    def enter(self, key: str, module: nn.Module, tensors: Sequence[torch.Tensor], run: Run) -> Replace:  # noqa: ARG002 - as its kin
        """The program's values in the place of a call's arguments. What differs is an error of the code around the call."""
        call, place = self._calls[key], self._places[key]
        self._running[key] = run
        if call.parent is None:
            return {}
        replaced: dict[int, torch.Tensor] = {}
        for i, (spot, seen, tensor) in enumerate(zip(place.inputs, call.inputs, tensors, strict=True)):
            if spot is None:
                if wrong := self._wrong.get(seen.fingerprint):
                    replaced[i] = _like(wrong.arranged(self._read([wrong.name])[wrong.name], seen.shape), tensor)
                continue
            array = spot.arranged(self._ours.take(spot.name), seen.shape)
            figures = measured_if_finite(to_array(tensor), array)
            if figures is None or array.shape != seen.shape:
                continue
            theirs = _like(array, tensor)
            if not figures.relative_l2 <= self._threshold:
                if not spot.sure and not self._reads(place, run, i, theirs):
                    continue  # the value is another tensor of the same shape
                self._wrong[seen.fingerprint] = spot
            # A tensor that a module returns which is not in the program is that module's matter; any other is the code's around the call.
            hidden = self._hidden.get(seen.fingerprint)
            if hidden is not None and not figures.relative_l2 <= self._threshold:
                self._note(hidden, figures, f"output, as {key} reads it", (key, i))
            else:
                self._note(self._maker(call, seen.fingerprint), figures, f"input of {key}", (key, i))
            replaced[i] = theirs
        return replaced

    def leave(self, key: str, module: nn.Module, tensors: Sequence[torch.Tensor]) -> Replace:  # noqa: ARG002 - as its kin
        """The program's values in the place of a call's results. What differs is an error of the module."""
        replaced: dict[int, torch.Tensor] = {}
        self._events += 1
        row = self.rows[key]
        if row.error <= self._threshold:
            self.rows[key] = dataclasses.replace(row, order=self._events)
        for j, (spot, tensor) in enumerate(zip(self._places[key].outputs, tensors, strict=True)):
            if spot is None:
                continue
            array = spot.arranged(self._ours.take(spot.name), tuple(tensor.shape))
            theirs, forced = self._theirs.take((key, j)), to_array(tensor)
            row = self.rows[key]
            total = measured(theirs, array)
            if row.total is None or total.relative_l2 > row.total.relative_l2:
                inherited = measured(theirs, forced)
                self.rows[key] = dataclasses.replace(row, total=total, inherited=inherited)
            if (figures := measured_if_finite(forced, array)) is not None:
                self._note(key, figures, "output", (key, j))
            if array.shape == tuple(tensor.shape):
                replaced[j] = _like(array, tensor)
        del self._running[key]
        return replaced

    def _maker(self, call: Call, fingerprint: str) -> str:
        """The call whose code made an argument of a call inside it: not one that was given the tensor itself, and passes it on."""
        found = self._calls[call.parent or ""]
        while found.parent is not None and any(seen.fingerprint == fingerprint for seen in found.inputs):
            found = self._calls[found.parent]
        return found.key

    def _note(self, key: str, figures: Figures, at: str, where: Output) -> None:
        """Notes an error of a module's own code; the worst counts, and the first over the threshold says when.

        Args:
            key: The module's call.
            figures: The error.
            at: Where it was found, in words.
            where: The same: the call whose argument or result it is, and its position.
        """
        self._events += 1
        row = self.rows[key]
        late = row.error <= self._threshold
        if row.injected is None or figures.relative_l2 > row.error or (figures.relative_l2 == row.error and at == "output"):
            row = dataclasses.replace(row, injected=figures, at=at)
            if not figures.relative_l2 <= self._threshold and not figures.problem and key in self._running:
                row = dataclasses.replace(row, sensitivity=self._sensitivity(key, where, argument=at != "output"))
        self.rows[key] = dataclasses.replace(row, order=self._events) if late else row

    def _reads(self, place: Place, run: Run, i: int, value: torch.Tensor) -> bool:
        """Whether a module's result in the program is what comes of the program's value, and not of the argument that PyTorch computed."""
        spots = [(j, spot) for j, spot in enumerate(place.outputs) if spot is not None]
        if not spots:
            return False
        read = self._read([spot.name for _, spot in spots])

        def error(change: Callable[[int, torch.Tensor], torch.Tensor]) -> float:
            results = [to_array(tensor) for tensor in tensors_of(run(change))]
            found = [measured_if_finite(results[j], spot.arranged(read[spot.name], results[j].shape)) for j, spot in spots]
            return max(figures.relative_l2 if figures is not None else math.inf for figures in found)

        plain = error(_unchanged)
        return plain > self._threshold and error(lambda at, tensor: value if at == i else tensor) < plain / 2

    def _sensitivity(self, key: str, where: Output, *, argument: bool) -> float:
        """How much a rounding of a module's arguments changes what is at a place inside it, relatively."""
        place = self._within(key, where[0])
        caught = [_Catcher(place, where[1], argument=argument) for _ in range(2)]
        self._running[key](_unchanged, caught[0])
        self._running[key](_rounded, caught[1])
        plain, rounded = (catcher.array for catcher in caught)
        figures = measured_if_finite(plain, rounded) if plain is not None and rounded is not None else None
        return figures.relative_l2 if figures is not None else 0.0

    def _within(self, key: str, inner: str) -> str:
        """The key of a call inside another one, where the calls are numbered from that one on."""

        def inside(call: Call | None) -> bool:
            while call is not None and call.key != key:
                call = self._calls[call.parent] if call.parent is not None else None
            return call is not None

        path = self._calls[inner].path
        return key_of(path, [c.key for c in self._calls.values() if c.path == path and inside(c)].index(inner))


class _Catcher(Visitor):
    """Keeps one argument or result of one call."""

    def __init__(self, key: str, position: int, *, argument: bool) -> None:
        self._key, self._position, self._argument = key, position, argument
        self.array: Array | None = None

    def enter(self, key: str, module: nn.Module, tensors: Sequence[torch.Tensor], run: Run) -> Replace:  # noqa: ARG002 - as its kin
        if self._argument and key == self._key:
            self.array = to_array(tensors[self._position])
        return {}

    def leave(self, key: str, module: nn.Module, tensors: Sequence[torch.Tensor]) -> Replace:  # noqa: ARG002 - as its kin
        if not self._argument and key == self._key:
            self.array = to_array(tensors[self._position])
        return {}


def _rounded(position: int, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it could have come out of a rounding to float32: every number larger or smaller by the unit roundoff."""
    if not tensor.is_floating_point():
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(position)) * 2 - 1
    return (tensor.double() * (1 + ROUNDOFF * signs)).to(tensor.dtype)


def _unchanged(position: int, tensor: torch.Tensor) -> torch.Tensor:  # noqa: ARG001 - see `Run`
    return tensor


def _hidden(place: Place) -> bool:
    """Whether a module computes something that is not in the program."""
    return bool(place.reason) and place.reason != UNCHANGED and not any(place.outputs)


def _like(array: Array, tensor: torch.Tensor) -> torch.Tensor:
    plain = array if array.dtype.kind in "biuf" else array.astype(np.float32)
    return torch.from_numpy(np.array(plain, copy=True)).to(tensor.dtype)
