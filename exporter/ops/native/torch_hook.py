"""The native kernels behind the torch operators: used when the library is built, the tensors are on the CPU, and no dtype is too wide."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import MachineError
from ...op import CustomOp
from ..torch_library import Compute, wide
from .binding import Buffer, Library, load
from .cmake import COMMAND, library

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


# None: use the library when it is there. False: never. True: it must be there.
_wanted: ContextVar[bool | None] = ContextVar("_wanted", default=None)


@contextlib.contextmanager
def native_kernels(wanted: bool) -> Iterator[None]:
    """Within it the torch operators use the torch form only, or refuse to do without the library, in place of using it when it is there."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def with_native(op: CustomOp, fallback: Compute) -> Compute:
    """The operator's kernel: the native one where it can be used, `fallback` elsewhere (other devices, float64, no library).

    A library that is built and does not load is an error: falling back in silence would hide it.
    """

    def compute(inputs: dict[str, Tensor], attributes: dict[str, Any]) -> tuple[Tensor, ...]:
        first = inputs[op.inputs[0].name]
        dtypes = {a.name: torch.float32 if a.wide else first.dtype for a in op.inputs}
        fits = first.dtype in _NAMES and all(x.device.type == "cpu" and x.dtype == dtypes[name] for name, x in inputs.items())
        wanted = _wanted.get()
        native = _library() if fits and wanted is not False else None
        if native is None:
            if wanted:
                raise MachineError(f"{op.name}: the native kernel is not built, or cannot take these tensors", hint=COMMAND)
            return fallback(inputs, attributes)
        given = {name: x.contiguous() for name, x in inputs.items()}
        sizes = op.infer({name: tuple(x.shape) for name, x in inputs.items()}, attributes)
        shapes = op.output_shapes(sizes)
        outputs = tuple(first.new_empty(shapes[a.name], dtype=wide(first.dtype) if a.wide else first.dtype) for a in op.outputs)
        buffers = {name: _buffer(x) for name, x in given.items()}
        native.run(op, buffers, [_buffer(x) for x in outputs], attributes, threads=torch.get_num_threads())
        return outputs

    return compute


def _library() -> Library | None:
    path = _found()
    return None if path is None else load(path)


@functools.cache
def _found() -> Path | None:
    # Once a process: a library that is built later is for the next one.
    return library()


def _buffer(x: Tensor) -> Buffer:
    return Buffer(x.data_ptr(), tuple(x.shape), _NAMES[x.dtype])
