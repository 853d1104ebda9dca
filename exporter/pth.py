"""A `.pth` of torch.save, read where a model's weights are published in no other way, and only if it holds nothing but tensors by name.

Such a file is a zip archive: one pickle of the names and shapes, and the tensors' bytes. Unpickling calls what the file asks for. Here

- the pickle may call what rebuilds a tensor and nothing else, which is checked before anything is unpickled, by torch's own restricted
  unpickler (`weights_only`);
- the file cannot become more than it is: its members are stored uncompressed, the pickle is short, and no tensor has more elements than
  there are bytes for.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .errors import Reason, WeightsError

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The element types that are read, and what safetensors calls them."""

_MAX_PICKLE_BYTES = 16 * 2**20  # the names and shapes of some 100,000 tensors
_REBUILD_TENSORS = frozenset({"collections.OrderedDict", "torch._utils._rebuild_tensor_v2"})
_STORAGE = re.compile(r"torch\.[A-Za-z0-9]+Storage")


def read_pth(file: Path, *, hint: str) -> dict[str, Tensor]:
    """The tensors of a `.pth` by name, on the CPU, mapped into memory and not read.

    Args:
        file: The file.
        hint: What to do about a file that is refused.

    Raises:
        WeightsError: It is no such file, or holds or calls anything else; all reasons of one kind are listed.
    """

    def refuse(why: str, reasons: Sequence[Reason] = ()) -> WeightsError:
        return WeightsError(f"{file} is not a .pth of tensors alone: {why}", reasons=reasons, hint=hint)

    if not file.is_file():
        raise refuse("it is not a regular file")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            pickles = [m for m in members if m.filename.endswith("/data.pkl")]
            if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > file.stat().st_size:
                raise refuse("its members are compressed or overlap, as those of torch.save never do")
            if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
                raise refuse(f"it must have one data.pkl, of at most {_MAX_PICKLE_BYTES // 2**20} MiB")
            with archive.open(pickles[0]) as stream:
                others = [name for name in _called(stream) if name not in _REBUILD_TENSORS and not _STORAGE.fullmatch(name)]
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise refuse(f"it is not a whole zip archive as torch.save writes it ({error})") from error
    if others:
        raise refuse("it calls more than what rebuilds tensors", [Reason("may not be called", where=name) for name in others])
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, EOFError) as error:
        raise refuse(f"it cannot be read ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(content, dict):
        raise refuse(f"it holds a {type(content).__name__}, expected tensors by name")
    reasons = [reason for name, value in content.items() if (reason := _not_plain(name, value)) is not None]
    if reasons:
        raise refuse(f"{len(reasons)} of its {len(content)} entries are something else", reasons)
    return dict(content)


def _called(stream: IO[bytes]) -> Iterator[str]:
    """Every function and class that a pickle names; of names that it computes, the opcode. ValueError for what is no pickle."""
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield opcode.name


def _not_plain(name: object, value: object) -> Reason | None:
    if not isinstance(name, str):
        return Reason(f"is named by a {type(name).__name__}, expected a string", where=repr(name)[:60])
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        return Reason(f"is a {type(value).__name__}, expected a dense tensor", where=name)
    if value.dtype not in TYPES:
        return Reason(f"has the type {str(value.dtype).removeprefix('torch.')}, expected one of {', '.join(TYPES.values())}", where=name)
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return Reason(f"has {value.numel()} elements, and bytes for fewer", where=name)
    return None
