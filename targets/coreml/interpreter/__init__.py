"""An interpreter of Core ML's ML Programs, in numpy and torch, for machines without Core ML.

`load` reads a model into coremltools' in-memory program (MIL); `Interpreter` executes it, operation by operation: each is computed in
float32 and its result rounded to the dtype that the program declares, as an accelerator with wide accumulators and narrow storage does.
`observe` keeps the range of every value of it.
It proves the converted program: what a device does beyond that (narrow accumulators, flushed subnormals, fused operations) it cannot know.

An operation is a function in one of the files of this folder, by family; `registry.operation` registers it. Semantics are those of
coremltools' documentation of the MIL operations (https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html).
"""

from __future__ import annotations

from .machine import Interpreter
from .observation import Observed, observe, peaks
from .program import load
from .registry import OPERATIONS

__all__ = ["OPERATIONS", "Interpreter", "Observed", "load", "observe", "peaks"]
