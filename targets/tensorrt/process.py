"""Runs the compiler in a process of its own: an abort, a hang or a lack of memory in NVIDIA's library becomes an error with a message."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from pydantic import ValidationError

from ...exporter.errors import IsthmusError
from .compiler import Outcome, Request
from .library import child_environment

_CHILD = "isthmus.targets.tensorrt.child"
_TAIL = 4000
_INTERVAL = 0.05


def compile_in_child(request: Request) -> Outcome:
    """Builds an engine in a child process.

    Raises:
        IsthmusError: The process was ended by a signal, did not end in time, or failed; with the end of its log.
    """
    library = request.recipe.library
    with tempfile.TemporaryDirectory(prefix="isthmus-tensorrt-") as scratch:
        asked, result, log = (Path(scratch) / name for name in ("request.json", "result.json", "log.txt"))
        asked.write_text(request.model_dump_json(), "utf-8")
        command = [sys.executable, "-m", _CHILD, str(asked), str(result)]
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - our own module
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(library),
                start_new_session=True,
            )
        peak, in_time = _wait(process, request.recipe.timeout)
        if in_time and process.returncode == 0 and result.is_file():
            with contextlib.suppress(ValidationError):
                outcome = Outcome.model_validate_json(result.read_bytes())
                return outcome if outcome.peak_rss else outcome.model_copy(update={"peak_rss": peak})
        raise _failure(library, process.returncode if in_time else None, peak, request.recipe.timeout, _tail(log))


def _wait(process: subprocess.Popen[bytes], timeout: int) -> tuple[int, bool]:
    """Waits for the end, or makes it when the time is over. Returns the most memory seen, in bytes, and whether it ended by itself."""
    peak, end = 0, time.monotonic() + timeout
    try:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            if time.monotonic() > end:
                _kill(process)
                return peak, False
            time.sleep(_INTERVAL)
    except BaseException:  # Ctrl-C must not leave a compiler behind
        _kill(process)
        raise
    return peak, True


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _failure(library: str, code: int | None, peak: int, timeout: int, tail: str) -> IsthmusError:
    memory = f"it held up to {peak / 2**20:.0f} MiB"
    if code is None:
        what = f"{library} did not build the engine within {timeout} s and was ended; {memory}"
        hint = "give it more time with --build-timeout"
    elif code == -signal.SIGKILL:
        what = f"the system ended {library} while it built the engine; {memory}"
        hint = "most likely the machine ran out of memory: build with less running, or on a machine with more"
    elif code < 0:
        what = f"{library} ended its process with {signal.Signals(-code).name} while it built the engine; {memory}"
        hint = "this is a fault of the library: its log names the last step; try another --opset, or report it to NVIDIA"
    else:
        what = f"the process that builds the engine failed with exit status {code}; {memory}"
        hint = "see the end of its log"
    return IsthmusError(f"{what}\nthe end of its log:\n{tail}", hint=hint)


def _tail(log: Path) -> str:
    text = log.read_text("utf-8", errors="replace").strip()
    return text if len(text) <= _TAIL else f"…{text[-_TAIL:]}"
