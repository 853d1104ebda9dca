"""Which values of a lowered program are the inputs and outputs of which PyTorch modules.

What is known of a program: the module that each of its nodes was made for, which values flow from node to node, and the shapes that these
have. What is known of the modules: shapes, and which tensors are the same ones (the second block reads what the first returned).

A module's **output** is the last value that its nodes make, that others read and that has the output's shape. Passes fuse nodes and merge
equal ones, and a fused node belongs to one module only: the others' outputs are then not in the program, and what is not there is said to
be *not visible*. A module's **input** is a value that its nodes read and do not make, and that is known to be the tensor (because it is
another module's output or the model's input), or is the only one of its shape. What is ambiguous is left out: to compare a module with
the wrong value is worse than not to compare it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..exporter.flow import Flow, Step
from .modules import Call, Seen

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

_SAME = frozenset("Cast Identity QuantizeLinear DequantizeLinear _to_copy to clone alias cast identity quantize dequantize".split())
"""Operators of ONNX, of ATen and of MIL that change how a tensor is stored, and not which one it is."""

UNCHANGED = "it returns what it is given"
"""The reason of a module that computes nothing."""


@dataclass(frozen=True)
class Spot:
    """A value of the program that is a tensor of PyTorch's.

    Attributes:
        name: The value's name.
        order: The order of its axes that is PyTorch's, sizes of 1 left out; None when the shapes are the same.
        sure: It is known to be the tensor by more than its shape.
    """

    name: str
    order: tuple[int, ...] | None = None
    sure: bool = True

    def arranged(self, array: Array, shape: Shape) -> Array:
        """The value as PyTorch lays it out, in `shape`."""
        if self.order is None:
            return array
        return array.reshape([size for size in array.shape if size != 1]).transpose(self.order).reshape(shape)


@dataclass(frozen=True)
class Place:
    """Where a call of a module is in the program.

    Attributes:
        inputs: For each tensor among its arguments, the value; None where it is not known.
        outputs: For each tensor among its results, the value; None where it is not in the program.
        steps: The nodes of the module itself; those of the modules inside it only where there are no others.
        reason: Why no output is visible; empty when one is.
    """

    inputs: tuple[Spot | None, ...]
    outputs: tuple[Spot | None, ...]
    steps: tuple[Step, ...]
    reason: str = ""


class Correspondence:
    """Finds the places of calls in a program.

    Args:
        calls: The calls of the reference, in the order in which they begin; see `modules.record`.
        flow: The program.
        aliases: Other paths of modules that have several; see `modules.aliases`.
    """

    def __init__(self, calls: Sequence[Call], flow: Flow, aliases: Mapping[str, str]) -> None:
        self._calls, self._flow = calls, flow
        self._activations = flow.activations()
        self._readers: dict[str, list[int]] = defaultdict(list)
        self._maker: dict[str, int] = {}
        self._members: dict[str, list[int]] = defaultdict(list)  # the steps of each module, those inside it included
        self._own: dict[str, list[int]] = defaultdict(list)
        for i, step in enumerate(flow.steps):
            for name in step.inputs:
                self._readers[name].append(i)
            self._maker.update(dict.fromkeys(step.outputs, i))
            path = _canonical(step.module, aliases)
            self._own[path].append(i)
            for above in _ancestors(path):
                self._members[above].append(i)
        self._returned = frozenset(flow.outputs)
        self._origin: dict[str, str] = {}
        repeats = Counter(call.path for call in calls)
        self._steps = {call.key: self._part(call, repeats[call.path]) for call in calls}
        self._leaving = {key: list(self._out(steps or ())) for key, steps in self._steps.items()}
        self._entering = {key: list(self._in(steps or ())) for key, steps in self._steps.items()}

    @property
    def names(self) -> list[str]:
        """The values whose shapes have to be known."""
        every = (*self._flow.inputs, *self._flow.outputs)
        return list(dict.fromkeys([*every, *itertools.chain(*self._leaving.values(), *self._entering.values())]))

    def places(self, shapes: Mapping[str, Shape]) -> dict[str, Place]:
        """The place of each call, by its key.

        Args:
            shapes: The shapes of `names`.
        """
        root = self._calls[0]
        known: dict[str, set[str]] = defaultdict(set)  # value to the tensors that it is, or may be
        values: dict[str, list[Spot]] = defaultdict(list)  # tensor to the values that it is
        likely: dict[str, list[Spot]] = defaultdict(list)  # the same, by its shape only
        outputs: dict[str, tuple[Spot | None, ...]] = {}

        def learn(spot: Spot, tensor: Seen) -> None:
            known[self._stored(spot.name)].add(tensor.fingerprint)
            values[tensor.fingerprint].append(spot)

        for name, tensor in zip(self._flow.inputs, root.inputs, strict=False):
            if shapes.get(name) == tensor.shape:
                learn(Spot(name), tensor)
        for call in self._calls:
            outputs[call.key] = self._returned_by_root(call, shapes) if call is root else self._outputs(call, shapes)
            for spot, tensor in zip(outputs[call.key], call.outputs, strict=True):
                if spot is not None:
                    learn(spot, tensor)
        for call in self._calls:
            # Equal modules on equal inputs are computed once.
            if not self._steps[call.key]:
                outputs[call.key] = tuple(next(iter(values.get(t.fingerprint, ())), None) for t in call.outputs)
        inputs = {root.key: tuple(next(iter(values.get(t.fingerprint, ())), None) for t in root.inputs)}
        for call in self._calls[1:]:
            inputs[call.key] = self._inputs(call, shapes, known, values, likely)
            for spot, tensor in zip(inputs[call.key], call.inputs, strict=True):
                if spot is not None and not spot.sure:
                    known[self._stored(spot.name)].add(tensor.fingerprint)
                    likely[tensor.fingerprint].append(spot)
        return {
            call.key: Place(inputs[call.key], outputs[call.key], self._shown(call), self._reason(call, outputs[call.key]))
            for call in self._calls
        }

    def _part(self, call: Call, repeats: int) -> list[int] | None:
        """The steps of one call; None where the calls of one module cannot be told apart."""
        steps = self._members[call.path]
        if repeats == 1:
            return steps
        each, rest = divmod(len(steps), repeats)
        parts = [steps[i * each : (i + 1) * each] for i in range(repeats)]
        kinds = {tuple((self._flow.steps[i].operator, self._flow.steps[i].module) for i in part) for part in parts}
        return None if rest or len({tuple(operator for operator, _ in kind) for kind in kinds}) > 1 else parts[call.number]

    def _out(self, steps: Sequence[int]) -> Iterator[str]:
        inside = set(steps)
        for i in steps:
            for name in self._flow.steps[i].outputs:
                leaves = name in self._returned or any(reader not in inside for reader in self._readers[name])
                if name in self._activations and leaves:
                    yield name

    def _in(self, steps: Sequence[int]) -> Iterator[str]:
        inside = set(steps)
        names = dict.fromkeys(name for i in steps for name in self._flow.steps[i].inputs)
        yield from (name for name in names if name in self._activations and self._maker.get(name, -1) not in inside)

    def _returned_by_root(self, root: Call, shapes: Mapping[str, Shape]) -> tuple[Spot | None, ...]:
        names = self._flow.outputs
        if len(names) != len(root.outputs):
            return (None,) * len(root.outputs)
        return tuple(_spot(name, shapes.get(name), t.shape) for name, t in zip(names, root.outputs, strict=True))

    def _outputs(self, call: Call, shapes: Mapping[str, Shape]) -> tuple[Spot | None, ...]:
        given = {t.fingerprint for t in call.inputs}
        wanted = Counter(t.shape for t in call.outputs)
        found: list[Spot | None] = []
        for tensor in call.outputs:
            same = [name for name in self._leaving[call.key] if shapes.get(name) == tensor.shape]
            if tensor.fingerprint in given or wanted[tensor.shape] > 1:
                found.append(None)
            elif same:
                found.append(Spot(same[-1]))
            else:
                other = [s for name in self._leaving[call.key] if (s := _spot(name, shapes.get(name), tensor.shape)) is not None]
                found.append(other[0] if len(other) == 1 else None)
        return tuple(found)

    def _inputs(
        self,
        call: Call,
        shapes: Mapping[str, Shape],
        known: Mapping[str, set[str]],
        values: Mapping[str, Sequence[Spot]],
        likely: Mapping[str, Sequence[Spot]],
    ) -> tuple[Spot | None, ...]:
        entering = {self._stored(name): name for name in reversed(self._entering[call.key])}
        found: list[Spot | None] = [None] * len(call.inputs)
        unknown: list[int] = []
        for i, tensor in enumerate(call.inputs):
            spots = values.get(tensor.fingerprint) or likely.get(tensor.fingerprint)
            for known_spot in spots or ():
                name = entering.get(self._stored(known_spot.name))
                if found[i] is None and name is not None:
                    found[i] = dataclasses.replace(known_spot, name=name)
            if not spots:  # a tensor that is in the program, and that this module does not read there, is nothing else that it reads
                unknown.append(i)
        taken = {self._stored(spot.name) for spot in found if spot is not None}
        rest = {stored: name for stored, name in entering.items() if stored not in taken}
        for i in unknown:
            tensor = call.inputs[i]
            if sum(call.inputs[j].shape == tensor.shape for j in unknown) > 1:
                continue
            fitting = [
                (spot, not known.get(stored) or tensor.fingerprint in known[stored])
                for stored, name in rest.items()
                if (spot := _spot(name, shapes.get(name), tensor.shape, sure=False)) is not None
            ]
            # What is another tensor in PyTorch comes last: a program that reads that in this one's place is wrong, and may be.
            for best in (
                [s for s, free in fitting if free and s.order is None],
                [s for s, free in fitting if free],
                [s for s, _ in fitting],
            ):
                if best:
                    found[i] = best[0] if len(best) == 1 else None
                    break
        return tuple(found)

    def _stored(self, name: str) -> str:
        """The value that this one is a copy of, perhaps in another type; itself when it is none."""
        if name not in self._origin:
            step = self._flow.steps[self._maker[name]] if name in self._maker else None
            read = [n for n in step.inputs if n in self._activations] if step is not None else []
            same = step is not None and step.operator in _SAME and len(read) == 1
            self._origin[name] = self._stored(read[0]) if same else name
        return self._origin[name]

    def _shown(self, call: Call) -> tuple[Step, ...]:
        steps = self._steps[call.key] or ()
        own = set(self._own[call.path])
        return tuple(self._flow.steps[i] for i in ([i for i in steps if i in own] or steps))

    def _reason(self, call: Call, outputs: Sequence[Spot | None]) -> str:
        if any(spot is not None for spot in outputs):
            return ""
        if not call.outputs:
            return "it returns no tensor"
        given = {t.fingerprint for t in call.inputs}
        if all(t.fingerprint in given for t in call.outputs):
            return UNCHANGED
        steps = self._steps[call.key]
        if steps is None:
            return "it is called several times, and its nodes cannot be told apart"
        if len({t.shape for t in call.outputs}) < len(call.outputs) and self._leaving[call.key]:
            return "it returns several tensors of one shape, and its values cannot be told apart"
        if not steps:
            return f"fused into {_named(call.path.rpartition('.')[0])}, or folded into constants"
        inside = set(steps)
        readers = [r for i in steps for name in self._flow.steps[i].outputs for r in self._readers[name] if r not in inside]
        if not any(name in self._activations for i in steps for name in self._flow.steps[i].outputs):
            return "folded into constants"
        if not readers:
            return "nothing reads what it computes"
        into = _common([call.path, *(self._flow.steps[r].module for r in readers)])
        return f"fused into {_named(into)}: no value of its shape leaves it"


def _spot(name: str, shape: Shape | None, wanted: Shape, *, sure: bool = True) -> Spot | None:
    """The value as a tensor of shape `wanted`, where there is one way only to lay it out so."""
    if shape is None:
        return None
    if shape == wanted:
        return Spot(name, None, sure)
    got, want = ([size for size in sizes if size != 1] for sizes in (shape, wanted))
    # Axes of equal size could be meant in any order.
    if math.prod(shape) != math.prod(wanted) or sorted(got) != sorted(want) or len(set(got)) < len(got):
        return None
    return Spot(name, tuple(got.index(size) for size in want), sure)


def _canonical(path: str, aliases: Mapping[str, str]) -> str:
    for above in reversed(list(_ancestors(path))):  # the longest first
        if above in aliases:
            return aliases[above] + path[len(above) :]
    return path


def _ancestors(path: str) -> Iterator[str]:
    """The module and those around it, the outermost first."""
    yield ""
    if path:
        parts = path.split(".")
        yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _common(paths: Sequence[str]) -> str:
    parts = [path.split(".") if path else [] for path in paths]
    return ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False)))


def _named(path: str) -> str:
    return path or "the model itself"
