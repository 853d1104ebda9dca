"""A program cut into a sequence of packages, each with a file of weights below a limit.

iOS refuses a file of weights past 1 GB, macOS past 2 GB. coremltools' `bisect_model` makes two halves, at the middle of the weights, of
which neither need be below the limit, and casts what passes between them to float32. Here the cuts are where the least passes, which is
between the blocks of a model, and what passes keeps its dtype: the sequence computes bit by bit what the whole does.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...exporter.errors import Reason, UnsupportedError
from ...exporter.quiet import quiet
from .interpreter import Interpreter, load
from .interpreter.program import used_by
from .rewriting import written

Array = np.ndarray[Any, Any]

_PASSED = ("fp16", "fp32", "int32")
"""The dtypes of a package's inputs and outputs."""


_UNIT = 64
"""A file of weights begins with a header of so many bytes, and each weight in it as well; weights are padded to a multiple of it."""


@dataclass(frozen=True)
class Chunk:
    """A part of a program.

    Attributes:
        model: A `coremltools.models.MLModel`, not loaded.
        inputs: The names of its inputs: some of the whole's, and outputs of chunks before it.
        outputs: The names of its outputs: some of the whole's, and inputs of chunks behind it.
        weights: Bytes of its file of weights.
    """

    model: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: int


def cut(model: Any, limit: int) -> list[Chunk]:
    """Cuts a model so that each part's weights stay below the limit, into as few parts as that takes.

    Args:
        model: A `coremltools.models.MLModel` with one function.
        limit: Bytes of a file of weights.

    Returns:
        The parts in order; the model itself where it is small enough. Each is fed the whole's inputs and the outputs of those before it,
        by name (see `Chain`).

    Raises:
        UnsupportedError: A single operation's weights are past the limit, a state is used on both sides of every cut, sizes vary, or what
            would pass between the parts has a dtype that no input has.
    """
    with quiet("coremltools"):
        program = load(model)
        plan = _Plan(program)
        cuts = plan.cuts(limit)
        edges = [0, *cuts, len(plan.steps)]
        if len(edges) == 2:
            function = program.functions["main"]
            return [Chunk(model, tuple(function.inputs), tuple(v.name for v in function.outputs), plan.weights(0, len(plan.steps)))]
        del program
        spans = list(itertools.pairwise(edges))
        return [
            _chunk(model, *plan.interface(first, last), written_states=plan.writes(first, last), weights=plan.weights(first, last))
            for first, last in spans
        ]


class Chain:
    """Executes parts one after the other, as an application does."""

    def __init__(self, parts: Sequence[Any], function: str | None = None) -> None:
        """Takes models, programs or paths of packages, in order, and the function of each that is meant; its default one when None.

        Raises:
            UnsupportedError, IsthmusError: See `load` and `Interpreter`.
        """
        self._parts = [Interpreter(load(part), function) for part in parts]

    def run(self, inputs: Mapping[str, Array], states: dict[str, Array] | None = None) -> dict[str, Array]:
        """The values of the whole's inputs by name to those of all parts' outputs by name.

        Raises:
            UsageError: An input that a part reads is missing.
            IsthmusError: See `Interpreter.run`.
        """
        values = dict(inputs)
        outputs: dict[str, Array] = {}
        for part in self._parts:
            results = part.run({name: values[name] for name in part.inputs if name in values}, states)
            values |= results
            outputs |= results
        return outputs


class _Plan:
    """The operations of a program, their weights, and what passes between them."""

    def __init__(self, program: Any) -> None:
        reasons = []
        if len(program.functions) != 1:
            reasons.append(Reason(f"has {len(program.functions)} functions", fix="cut each before they are put together"))
        self._function = next(iter(program.functions.values()))
        self.steps = _late_reads(
            [op for op in self._function.operations if op.op_type != "const" and not op.op_type.startswith("constexpr_")]
        )
        made = {variable: i for i, op in enumerate(self.steps) for variable in op.outputs}
        self._made = made
        self._last: dict[Any, int] = {}
        for i, op in enumerate(self.steps):
            self._last.update({variable: i for variable in used_by(op) if variable in made})
        self._stored = [_stored(op) for op in self.steps]
        sizes = [sum(weights.values()) for weights in self._stored]
        self._before = np.concatenate([[0], np.cumsum(sizes)])
        self._states: dict[str, tuple[int, int]] = {}
        for name, variable in self._function.inputs.items():
            uses = [i for i, op in enumerate(self.steps) if variable in set(used_by(op))]
            if uses and _is_state(variable):
                self._states[name] = (uses[0], uses[-1])
        varying = [v.name for v in made if any(not isinstance(size, int | np.integer) for size in v.shape or ())]
        if varying:
            reasons.append(Reason(f"{len(varying)} values have sizes that vary, {varying[0]} the first", fix="--shapes fixed"))
        if reasons:
            raise UnsupportedError("the program cannot be cut into chunks", reasons=reasons)

    def weights(self, first: int, last: int) -> int:
        """Bytes of the weights of these operations; one that several of them read counts once."""
        together: dict[str, int] = {}
        for stored in self._stored[first:last]:
            together |= stored
        return _UNIT + sum(together.values())

    def cuts(self, limit: int) -> list[int]:
        """The operations that parts begin with: fewest parts first, then the fewest bytes that pass between them.

        Raises:
            UnsupportedError: See `cut`.
        """
        count = len(self.steps)
        if self.weights(0, count) <= limit:
            return []
        passing = self._passing()
        places = [0, *(i for i in range(1, count) if passing[i] is not None and self._best_near(passing, i)), count]
        best: dict[int, tuple[int, int, int]] = {0: (0, 0, 0)}  # place -> parts, bytes passed, the place before it
        for end in places[1:]:
            for start in reversed(places[: places.index(end)]):
                if self._before[end] - self._before[start] > limit and self.weights(start, end) > limit:
                    break
                if start in best:
                    parts, passed, _ = best[start]
                    found = (parts + 1, passed + (passing[end] or 0 if end < count else 0), start)
                    best[end] = min(best.get(end, found), found)
        if count not in best:
            raise UnsupportedError("the program cannot be cut into chunks", reasons=self._too_large(limit, places))
        cuts = []
        place = count
        while place:
            place = best[place][2]
            cuts.append(place)
        return cuts[-2::-1]

    def interface(self, first: int, last: int) -> tuple[list[str], list[str]]:
        """The names of the values that these operations read from those before them, and of those that are read behind, or returned."""
        own = [v for v, i in self._made.items() if first <= i < last]
        returned = set(self._function.outputs)
        read = {v: None for op in self.steps[first:last] for v in used_by(op) if v in self._made and self._made[v] < first}
        return [v.name for v in read], [v.name for v in own if v in returned or self._last.get(v, -1) >= last]

    def writes(self, first: int, last: int) -> set[str]:
        """The names of these operations that change a state."""
        return {op.name for op in self.steps[first:last] if op.op_type in _WRITES}

    def _passing(self) -> list[int | None]:
        """For each place the bytes that pass it; None where something passes that no input can be."""
        from coremltools.converters.mil.mil import types

        passing: list[int | None] = [0] * (len(self.steps) + 1)
        for variable, i in self._made.items():
            kind = types.builtin_to_string(variable.dtype)
            fits = kind in _PASSED and variable.shape
            size = int(np.prod(variable.shape or (1,))) * (2 if kind == "fp16" else 4)
            for place in range(i + 1, self._last.get(variable, i) + 1):
                before = passing[place]
                passing[place] = before + size if fits and before is not None else None
        for first, last in self._states.values():
            passing[first + 1 : last + 1] = [None] * (last - first)
        return passing

    @staticmethod
    def _best_near(passing: list[int | None], i: int) -> bool:
        """Whether neither neighbour is a better place: a few hundred places are enough to choose from."""
        here = passing[i]
        assert here is not None
        before, behind = passing[i - 1], passing[i + 1]
        return (before is None or i == 1 or here <= before) and (behind is None or i + 2 == len(passing) or here <= behind)

    def _too_large(self, limit: int, places: list[int]) -> list[Reason]:
        reasons = []
        for start, end in itertools.pairwise(places):
            size = self.weights(start, end)
            if size > limit:
                largest = max(range(start, end), key=lambda i: sum(self._stored[i].values()))
                what = f"{size} bytes of weights cannot be divided, got a limit of {limit}"
                reasons.append(Reason(what, where=self.steps[largest].name, fix=f"a limit of {size} at least, or compressed weights"))
        return reasons


_WRITES = frozenset({"coreml_update_state", "write_state"})
"""The operations that change a state; dead code elimination keeps them wherever they are."""


def _late_reads(steps: list[Any]) -> list[Any]:
    """The operations with those that read a state right before what uses it first: coremltools puts them first of all."""
    late = list(steps)
    for read in [op for op in steps if op.op_type == "read_state"]:
        late.remove(read)
        first = next((i for i, op in enumerate(late) if read.outputs[0] in set(used_by(op))), len(late))
        late.insert(first, read)
    return late


def _is_state(variable: Any) -> bool:
    from coremltools.converters.mil.mil import types

    return bool(types.is_state(variable.sym_type))


def _stored(operation: Any) -> dict[str, int]:
    """Bytes of each weight that an operation reads, as they are in the file."""
    from coremltools.converters.mil.backend.mil.load import should_use_weight_file
    from coremltools.converters.mil.mil import types

    sizes: dict[str, int] = {}
    waiting = [v for v in used_by(operation) if v is not None]
    while waiting:
        variable = waiting.pop()
        source = variable.op
        if source is None:
            continue
        if source.op_type.startswith("constexpr_"):
            waiting += [v for v in used_by(source) if v is not None]
        elif source.op_type == "const" and isinstance(variable.val, np.ndarray) and should_use_weight_file(variable.val):
            width = re.search(r"\d+$", types.builtin_to_string(variable.dtype))
            sizes[variable.name] = _UNIT - (-variable.val.size * (int(width[0]) if width else 8) // 8 // _UNIT) * _UNIT
    return sizes


def _chunk(model: Any, inputs: list[str], outputs: list[str], written_states: set[str], weights: int) -> Chunk:
    """The part of the model that computes the outputs from the inputs, and from those of the whole, and changes these states alone."""
    from coremltools.converters.mil.mil import Placeholder
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    program = load(model)
    function = program.functions["main"]
    made = {variable.name: variable for op in function.operations for variable in op.outputs}
    with function:
        for name in inputs:
            old = made[name]
            given = Placeholder(sym_shape=old.shape, dtype=old.dtype, name=name).outputs[0]
            function._input_dict[name] = given  # as coremltools' own bisect_model does; there is no public way
            function.replace_uses_of_var_after_op(anchor_op=old.op, old_var=old, new_var=given, no_check_var_types=True, force_replace=True)
        function.set_outputs([made[name] for name in outputs])
        for op in [op for op in function.operations if op.op_type in _WRITES and op.name not in written_states]:
            for old in op.outputs:
                function.replace_uses_of_var_after_op(
                    anchor_op=op, old_var=old, new_var=op.value, no_check_var_types=True, force_replace=True
                )
            function.remove_ops([op])
    PASS_REGISTRY["common::dead_code_elimination"](program)
    for name in [name for name, variable in function._input_dict.items() if not variable.child_ops]:
        del function._input_dict[name]
    function.function_inputs = tuple(function._input_dict.values())
    part = written(program, model, same_interface=False)
    return Chunk(part, tuple(function._input_dict), tuple(outputs), weights)
