"""The library's C interface through ctypes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import IsthmusError, Reason, UsageError
from ...op import CustomOp

DTYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
"""The dtypes of activations that kernels take, with ONNX's numbers for them."""


@dataclass(frozen=True)
class Buffer:
    """Contiguous memory of a tensor, which the caller keeps alive.

    Attributes:
        address: Where it begins.
        shape: Its sizes, four at most.
        dtype: A key of `DTYPES`.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("shape", ctypes.c_int64 * 4), ("rank", ctypes.c_int32), ("dtype", ctypes.c_int32))


class _Attribute(ctypes.Structure):
    _fields_ = (("number", ctypes.c_double), ("text", ctypes.c_char_p))


class Library:
    """The loaded library."""

    def __init__(self, path: Path, loaded: ctypes.CDLL) -> None:
        self.path = path
        self._library = loaded

    def run(
        self, op: CustomOp, inputs: Mapping[str, Buffer], outputs: Sequence[Buffer], attributes: Mapping[str, Any], *, threads: int
    ) -> None:
        """Runs an operator's kernel.

        Args:
            op: The operator.
            inputs: The inputs that are given, by name.
            outputs: All outputs, in the schema's order, with the shapes that the inputs imply; they are overwritten.
            attributes: All attributes.
            threads: How many threads work on it.

        Raises:
            UsageError: The inputs do not fit each other.
        """
        tensors = (_Tensor * len(op.inputs))(*(_tensor(inputs.get(a.name)) for a in op.inputs))
        results = (_Tensor * len(outputs))(*(_tensor(o) for o in outputs))
        settings = (_Attribute * max(len(op.attributes), 1))(*(_attribute(attributes[a.name]) for a in op.attributes))
        message = ctypes.create_string_buffer(512)
        if self._library.isthmus_run(op.name.encode(), tensors, results, settings, threads, message, len(message)):
            raise UsageError(f"the inputs of {op.name} do not fit", reasons=[Reason(message.value.decode(errors="replace"))])

    def levels(self) -> list[str]:
        """The instruction set in use, then all that this processor executes.

        Raises:
            UsageError: The environment variable ISTHMUS_OPS_ISA names one that it does not.
        """
        message = ctypes.create_string_buffer(512)
        failed = self._library.isthmus_levels(message, len(message))
        text = message.value.decode(errors="replace")
        if failed:
            raise UsageError(f"ISTHMUS_OPS_ISA: {text}", hint="unset it, or set it to baseline, avx2 or avx512")
        return text.split()

    def choose_level(self, name: str) -> None:
        """Chooses the instruction set for all later calls of this process, those of ONNX Runtime included; the best with "".

        Raises:
            UsageError: There is no such one, or this processor does not execute it.
        """
        message = ctypes.create_string_buffer(512)
        if self._library.isthmus_choose_level(name.encode(), message, len(message)):
            raise UsageError(message.value.decode(errors="replace"))

    def probe(self, function: int, source: Buffer, target: Buffer, count: int, repeats: int = 1) -> None:
        """Applies an elementary function of the kernels to `count` floats, `repeats` times.

        Args:
            function: 0 exp, 1 exp2, 2 softplus, 3 silu, 4 exp2 for exponents of at most 125.
            source: float32.
            target: float32, as long.
            count: How many numbers.
            repeats: How many times, for measuring.
        """
        self._library.isthmus_probe(
            function, ctypes.c_void_p(source.address), ctypes.c_void_p(target.address), ctypes.c_int64(count), ctypes.c_int64(repeats)
        )


@functools.cache
def load(path: Path) -> Library:
    """Loads the library.

    Raises:
        IsthmusError: It cannot be loaded.
    """
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.isthmus_run.argtypes = [
            ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t,
        ]  # fmt: skip
        loaded.isthmus_levels.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        loaded.isthmus_choose_level.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    except (OSError, AttributeError) as error:
        raise IsthmusError(f"{path} cannot be loaded: {error}", hint=f"delete {path}; python -m isthmus.exporter.ops.native") from error
    return Library(path, loaded)


def _tensor(buffer: Buffer | None) -> _Tensor:
    if buffer is None:
        return _Tensor(None, (ctypes.c_int64 * 4)(), -1, 0)
    return _Tensor(buffer.address, (ctypes.c_int64 * 4)(*buffer.shape), len(buffer.shape), DTYPES[buffer.dtype])


def _attribute(value: Any) -> _Attribute:
    return _Attribute(0.0, value.encode()) if isinstance(value, str) else _Attribute(float(value), None)
