"""Shapes: fixed, of rank 4, of axes that are not too long, and a last axis that fills its 64 bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from .chips import chips_before
from .program import ProgramSubject, shape, stored, tensors

_LONG, _LONGER = 16384, 65536
_LANES = 32  # float16 numbers in 64 bytes
_MANY = 4096  # elements above which padding costs


@register_rule(
    "ANE-201",
    summary="input with a range of shapes",
    effect="leaves the engine",
    targets=("coreml",),
    fix="export with --shapes fixed, or with enumerated, a package a size, and pad what is smaller",
    source="https://github.com/apple/coremltools/issues/1764; https://github.com/apple/coremltools/issues/2370",
    reads="mil",
    verdict="likely",
)
def ranges(subject: ProgramSubject) -> Iterator[Match]:
    """An input takes a range of sizes: the engine is compiled for fixed ones."""
    for name, accepted in subject.flexible_inputs():
        if accepted.ranges:
            yield Match(f"the input takes the shapes {accepted}, and the Neural Engine is compiled for fixed ones", where=name, name=name)


@register_rule(
    "ANE-202",
    summary="input with enumerated shapes",
    effect="unproven",
    targets=("coreml",),
    fix="export with --shapes fixed where one size will do",
    source="https://github.com/apple/coremltools/issues/1909; https://github.com/apple/coremltools/issues/2370",
    reads="mil",
    verdict="likely",
)
def enumerated(subject: ProgramSubject) -> Iterator[Match]:
    """An input takes a few shapes: some saw only the first of them run on the engine."""
    for name, accepted in subject.flexible_inputs():
        if accepted.shapes:
            yield Match(f"the input takes {accepted}: shapes but the first may run elsewhere", where=name, name=name)


@register_rule(
    "ANE-203",
    summary="tensor of rank above 4",
    effect="leaves the engine",
    targets=("coreml",),
    fix="keep tensors in (B, C, 1, S): export with --layout ane, or join axes before the operation",
    source="https://machinelearning.apple.com/research/neural-engine-transformers; "
    "https://github.com/apple/coremltools/issues/1723: Core ML has no rank above 5",
    reads="mil",
    verdict="likely",
)
def rank(subject: ProgramSubject) -> Iterator[Match]:
    """A result has five axes or more."""
    for operation in subject.operations():
        found = max((len(shape(v)) for v in operation.outputs), default=0)
        if found > 4 and operation.op_type not in ("matmul", "transpose"):
            fix = "join axes before the operation" if subject.laid_out else ""
            yield subject.match(operation, f"{operation.op_type} of rank {found}, and the Neural Engine's layout has rank 4", fix)


@register_rule(
    "ANE-204",
    summary="matmul or transpose of rank 5",
    effect="leaves the engine",
    targets=("coreml",),
    fix="join the axes in front of the last two before the operation",
    source="https://github.com/apple/coremltools/issues/1723 and the issues it names; "
    "https://aneforge.readthedocs.io/en/latest/capabilities/: products of rank 4 at most",
    reads="mil",
    verdict="likely",
)
def moved_rank(subject: ProgramSubject) -> Iterator[Match]:
    """A product or transpose has five axes: together they fail to compile for the engine."""
    for operation in subject.operations("matmul", "transpose"):
        found = max(len(shape(v)) for v in (*operation.outputs, operation.x))
        if found > 4:
            yield subject.match(operation, f"{operation.op_type} of rank {found}, expected at most 4")


@register_rule(
    "ANE-205",
    summary="axis longer than the engine's",
    effect="leaves the engine",
    targets=("coreml",),
    fix="split the axis, as a vocabulary or a sequence can be",
    source="https://aneforge.readthedocs.io/en/latest/capabilities/: 16384 through A15, 65536 at A16, channels 65536 everywhere",
    reads="mil",
    verdict="likely",
)
def long_axis(subject: ProgramSubject) -> Iterator[Match]:
    """An axis of a result or operand is longer than 16384, or than 65536 from A16 on; channels of a tensor of rank 4 than 65536."""
    limit = _LONGER if subject.generation >= 16 else _LONG
    for operation in subject.operations():
        for variable in (*operation.outputs, *(v for v in tensors(operation) if hasattr(v, "shape"))):
            sizes = shape(variable)
            found = [n for i, n in enumerate(sizes) if n > (_LONGER if len(sizes) == 4 and i == 1 else limit)]
            if found:
                only = "" if found[0] > _LONGER or subject.chip else f" (on {chips_before(16)})"
                bound = _LONGER if found[0] > _LONGER else limit
                yield subject.match(operation, f"{operation.op_type} with an axis of {found[0]}, the longest is {bound}{only}")
                break


@register_rule(
    "ANE-206",
    summary="last axis that wastes half of its 64 bytes or more",
    effect="wasteful",
    targets=("coreml",),
    fix="put the longest axis last, as --layout ane does with the positions; pad it to a multiple of 32",
    source="https://machinelearning.apple.com/research/neural-engine-transformers: padded to 64 bytes, 32 times for an axis of 1",
    reads="mil",
    verdict="likely",
)
def narrow(subject: ProgramSubject) -> Iterator[Match]:
    """A large tensor's last axis is padded to at least twice its size: shorter than 17 numbers of float16."""
    for operation in subject.operations():
        for variable in operation.outputs:
            sizes = shape(variable)
            if len(sizes) >= 3 and math.prod(sizes) >= _MANY and not stored(variable):
                padded = math.ceil(sizes[-1] / _LANES) * _LANES
                if padded >= 2 * sizes[-1]:
                    what = f"{operation.op_type} whose last axis of {sizes[-1]} is padded {padded / sizes[-1]:.3g} times"
                    yield subject.match(operation, what, "pad it to a multiple of 32, or take longer sequences" if subject.laid_out else "")
