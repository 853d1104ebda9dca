"""Types that the Neural Engine does not compute in: its numbers are float16."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ....exporter.lint import Match, register_rule
from .program import ProgramSubject, dtype, shape

_FEW = 64  # elements: labels, and the arithmetic of shapes


@register_rule(
    "ANE-101",
    summary="operation that computes in float32",
    effect="leaves the engine",
    targets=("coreml",),
    fix="export in fp16; the report says which modules stay in float32 because their values leave float16's range",
    source="https://github.com/hollance/neural-engine/blob/master/docs/16-bit.md; https://aneforge.readthedocs.io/en/latest/capabilities/",
    reads="mil",
    verdict="likely",
)
def float32(subject: ProgramSubject) -> Iterator[Match]:
    """A result is float32. Casts are the borders, and are not counted."""
    for operation in subject.operations():
        if operation.op_type != "cast" and any(dtype(v) == "fp32" for v in operation.outputs):
            yield subject.match(operation, f"{operation.op_type} computes in float32, and the Neural Engine in float16")


@register_rule(
    "ANE-102",
    summary="operation on more than 64 integers",
    effect="leaves the engine",
    targets=("coreml",),
    fix="compute in floating point, or before the model is called",
    source="https://aneforge.readthedocs.io/en/latest/capabilities/: int32 is rejected; https://github.com/hollance/neural-engine",
    reads="mil",
    verdict="likely",
)
def integers(subject: ProgramSubject) -> Iterator[Match]:
    """A result is int32 or another integer, bool excepted, which comparisons make and select reads."""
    for operation in subject.operations():
        found = [v for v in operation.outputs if dtype(v).startswith(("int", "uint")) and math.prod(shape(v)) > _FEW]
        if operation.op_type != "cast" and found:
            yield subject.match(operation, f"{operation.op_type} computes in {dtype(found[0])}, and the Neural Engine in float16")
