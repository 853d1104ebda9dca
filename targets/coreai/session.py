"""Executes an asset in Core AI's run time on the CPU, in a child process: an abort or a hang of the library becomes an error."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...exporter.arrays import save_arrays
from ...exporter.errors import IsthmusError, Reason
from ...exporter.runner import Runner
from ...exporter.spec import Arrays
from .library import check_installed

_CHILD = "isthmus.targets.coreai.child"
_TAIL = 2000
_LONGEST_ANSWER = 2**24

FILES = ("main.mlirb", "main.hash", "metadata.json")
"""What every asset holds. The run time does not look at the hash."""

_NARROW = {"int64": "int32", "float64": "float32"}
"""Types that Core AI lacks, and those that stand for them."""


class CoreAIRunner(Runner):
    """One asset, loaded in a child process.

    Args:
        path: The `.aimodel`.
        dtypes: The dtype of each output in PyTorch; Core AI has no int64 and no float64, and results come back in PyTorch's.
        timeout: Seconds that loading, and each call, may take.

    Raises:
        MachineError: coreai-core is not installed.
        IsthmusError: A file of the asset is missing or damaged, or the run time refuses it.
    """

    device = "Core AI's run time on the CPU"

    def __init__(self, path: Path, dtypes: Mapping[str, str], *, timeout: float) -> None:
        check_installed("the asset cannot be executed")
        check_files(path)
        self._name, self._dtypes, self._timeout = path.name, dtypes, timeout
        self._calls = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="isthmus-coreai-")
        self._log = Path(self._folder.name) / "log.txt"
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(  # noqa: S603 - our own module
                    [sys.executable, "-m", _CHILD, str(path.absolute())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                    cwd=self._folder.name,
                    # The library leaves files behind in a process that is ended.
                    env={**environment(), "TMPDIR": self._folder.name},
                )
            loaded = self._answer("loading")
        except BaseException:  # Ctrl-C must not leave a process behind
            self.close()
            raise
        self._inputs: dict[str, tuple[str, tuple[int | None, ...]]] = {
            name: (dtype, tuple(shape)) for name, (dtype, shape) in loaded["inputs"].items()
        }
        self._outputs: list[str] = loaded["outputs"]
        if loaded["widened"]:
            self.device = f"{type(self).device}, products of float16 summed in float32"

    def run(self, inputs: Arrays) -> Arrays:
        """Executes the asset once; see `Runner.run`."""
        if self._process is None:
            raise IsthmusError(f"the runner of {self._name} is closed")
        if reasons := self._misfits(inputs):
            raise IsthmusError(f"the inputs do not fit {self._name}", reasons=reasons)
        self._calls += 1
        # An input that the model never reads is none of the asset's.
        given = {name: np.asarray(inputs[name]).astype(dtype) for name, (dtype, _) in self._inputs.items()}
        asked, result = (Path(self._folder.name) / f"{self._calls}-{what}.npz" for what in ("inputs", "outputs"))
        save_arrays(asked, given)
        try:
            self._send({"inputs": str(asked), "outputs": str(result)})
            self._answer("executing")
            with np.load(result, allow_pickle=False) as data:
                outputs = {name: data[name] for name in self._outputs}
        except (OSError, ValueError, KeyError) as error:
            raise IsthmusError(f"Core AI's run time gave no readable outputs for {self._name}: {error}") from error
        finally:
            asked.unlink(missing_ok=True)
            result.unlink(missing_ok=True)
        return {name: array.astype(self._dtypes.get(name, array.dtype)) for name, array in outputs.items()}

    def close(self) -> None:
        """Ends the child process and removes its files."""
        if self._process is not None:
            process, self._process = self._process, None
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._folder.cleanup()

    def _misfits(self, inputs: Arrays) -> list[Reason]:
        reasons = [Reason("the model has this input and it was not given", where=name) for name in self._inputs if name not in inputs]
        for name, (dtype, shape) in self._inputs.items():
            if name not in inputs:
                continue
            array = np.asarray(inputs[name])
            if (got := _NARROW.get(str(array.dtype), str(array.dtype))) != dtype:
                reasons.append(Reason(f"has dtype {array.dtype}, expected {dtype}", where=name))
            elif array.dtype.kind == "i" and array.size and not np.array_equal(array.astype(got), array):
                reasons.append(Reason(f"holds numbers beyond {got}, which is what Core AI has for {array.dtype}", where=name))
            if len(shape) != array.ndim or any(
                want is not None and want >= 0 and want != size for want, size in zip(shape, array.shape, strict=False)
            ):
                readable = tuple("?" if size is None or size < 0 else size for size in shape)
                reasons.append(Reason(f"has shape {array.shape}, expected {readable}", where=name))
        return reasons

    def _send(self, request: Mapping[str, str]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{json.dumps(request)}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the answer says so

    def _answer(self, doing: str) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = _line(self._process.stdout, self._timeout)
        if line is None:
            raise self._failure(
                f"took longer than {self._timeout:.0f} s {doing} {self._name} and was ended", "give it more time with --timeout"
            )
        if not line:
            code = self._process.wait()
            how = f"ended its process with {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
            raise self._failure(f"{how} while {doing} {self._name}", "this is a fault of the library: export again, or report it to Apple")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failure(f"failed while {doing} {self._name}: {answer['error']}", "see the error; a damaged asset is exported again")
        return answer

    def _failure(self, what: str, hint: str) -> IsthmusError:
        text = self._log.read_text("utf-8", errors="replace").strip()
        lines = [line for line in text.splitlines() if not line.startswith("ODIE [default]")]
        tail = "\n".join(lines)[-_TAIL:]
        return IsthmusError(f"Core AI's run time {what}" + (f"\nthe end of its log:\n{tail}" if tail else ""), hint=hint)


def environment() -> dict[str, str]:
    """That of a child process: it finds the modules that this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def check_files(path: Path) -> None:
    """Whether an asset is whole, as far as that is seen without its run time.

    Raises:
        IsthmusError: Files are missing or empty, or the program is not the one whose hash the asset holds.
    """
    import hashlib

    if not path.is_dir():
        raise IsthmusError(f"{path} is not there, expected an asset: a folder", hint="export again, or copy it again")
    reasons = []
    for name in FILES:
        file = path / name
        if not file.is_file():
            reasons.append(Reason("the file is missing", where=name))
        elif not file.stat().st_size:
            reasons.append(Reason("the file is empty", where=name))
    if not reasons:
        with (path / FILES[0]).open("rb") as stream:
            got = hashlib.file_digest(stream, "sha256").digest()
        if got != (expected := (path / FILES[1]).read_bytes()):
            reasons.append(Reason(f"sha256 is {got.hex()}, expected {expected.hex()}", where=FILES[0]))
    if reasons:
        raise IsthmusError(f"the asset {path} is damaged", reasons=reasons, hint="export again, or copy it again")


def _line(stream: IO[bytes], timeout: float) -> bytes | None:
    """The next line, without its end; None when it has not come in time, and nothing when the stream has ended."""
    found, end = b"", time.monotonic() + timeout
    while not found.endswith(b"\n") and len(found) < _LONGEST_ANSWER:
        ready, _, _ = select.select([stream], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        part = os.read(stream.fileno(), 2**16)
        if not part:
            return b""
        found += part
    return found.strip()
