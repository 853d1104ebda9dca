"""What trials have found, kept in a file that only grows, so that a search that was killed goes on where it was.

A line is one result, `{"key": K, "values": [NUMBER, …], "sha256": S}`, where S is the sha256 of the line without it. A line that was
written in part, as the last one is when the process is killed or the disk is full, is no result: it is passed over, and its trial runs
again. Numbers are written so that the same float64 is read back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..exporter.errors import IsthmusError

MAX_BYTES = 256 * 2**20
"""Of a journal; one of a thousand modules has some 500 KiB."""


class Journal:
    """The results by key.

    Args:
        path: The file; made when the first result is added.

    Raises:
        IsthmusError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, tuple[float, ...]] = {}
        try:
            data = path.read_bytes() if path.exists() and path.stat().st_size <= MAX_BYTES else b""
        except OSError as error:
            raise IsthmusError(f"the journal {path} cannot be read: {error.strerror}", hint="delete it to begin anew") from error
        for line in data.split(b"\n"):
            if (result := _read(line)) is not None:
                self._found[result[0]] = result[1]
        self._whole = not data or data.endswith(b"\n")

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> tuple[float, ...] | None:
        """The numbers of a key; None where it has none."""
        return self._found.get(key)

    def add(self, key: str, values: Sequence[float]) -> None:
        """Adds a result. It is on the disk when this returns.

        Raises:
            IsthmusError: It cannot be written.
        """
        line = _line(key, values)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                # What a killed process began is ended, so that it does not become the beginning of this line.
                os.write(descriptor, (b"" if self._whole else b"\n") + line + b"\n")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise IsthmusError(
                f"cannot write the journal {self.path}: {error.strerror}", hint="free some space, or give another -o"
            ) from error
        self._whole = True
        self._found[key] = tuple(values)


def _line(key: str, values: Sequence[float]) -> bytes:
    content = {"key": key, "values": list(values)}
    return json.dumps({**content, "sha256": _digest(content)}).encode()


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(line: bytes) -> tuple[str, tuple[float, ...]] | None:
    try:
        value = json.loads(line)
        content = {"key": value["key"], "values": value["values"]}
        numbers = tuple(float(number) for number in content["values"])
        sound = isinstance(content["key"], str) and all(map(math.isfinite, numbers)) and value["sha256"] == _digest(content)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return (content["key"], numbers) if sound else None
