"""The native kernels on numpy arrays, at an instruction set of one's choice: for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...op import CustomOp
from .binding import Buffer, Library, load
from .cmake import build

Array = np.ndarray[Any, Any]


def run(op: CustomOp, inputs: Mapping[str, Array], attributes: Mapping[str, Any], *, level: str = "", threads: int = 2) -> dict[str, Array]:
    """Runs an operator; builds the library when it is not there.

    Args:
        op: The operator.
        inputs: The inputs that are given.
        attributes: All attributes.
        level: The instruction set; the best with "".
        threads: How many threads work on it.

    Returns:
        The outputs by name, filled with NaN before the kernel ran, so that nothing unwritten passes for a result.

    Raises:
        UsageError: The inputs do not fit, or the processor does not execute the instruction set.
    """
    library = load(build())
    given = {name: np.ascontiguousarray(x) for name, x in inputs.items()}
    shapes = op.output_shapes(op.infer({name: x.shape for name, x in given.items()}, attributes))
    dtype = given[op.inputs[0].name].dtype
    outputs = {a.name: np.full(shapes[a.name], np.nan, np.float32 if a.wide else dtype) for a in op.outputs}
    library.choose_level(level)
    try:
        buffers = {name: buffer(x) for name, x in given.items()}
        library.run(op, buffers, [buffer(x) for x in outputs.values()], attributes, threads=threads)
    finally:
        library.choose_level("")
    return outputs


def buffer(x: Array) -> Buffer:
    """A contiguous array's memory; the caller keeps the array."""
    return Buffer(x.ctypes.data, x.shape, str(x.dtype))


def missing(level: str) -> str:
    """Why the instruction set cannot be executed here, or ""."""
    library: Library = load(build())
    return "" if level in library.levels() else f"this processor does not execute {level}"
