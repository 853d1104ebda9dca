"""Where trials run: in this process, in several on this machine, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from ..exporter.errors import IsthmusError, MachineError
from .trials import Noise, Trials

On = Sequence[int]
"""The switches of a trial that are on."""


class Executor(Protocol):
    """Runs trials. It closes when its `with` block ends."""

    def run(self, folder: Path, trials: Mapping[str, On]) -> Iterator[tuple[str, Noise]]:
        """The results as they come, in any order.

        Args:
            folder: See `trials`.
            trials: By key.

        Raises:
            IsthmusError: A trial failed.
        """
        ...

    def __enter__(self) -> Executor: ...

    def __exit__(self, *error: object) -> None: ...


class InProcess:
    """Runs one trial after the other, here."""

    def __init__(self) -> None:
        self._opened: tuple[Path, Trials] | None = None

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened = None

    def run(self, folder: Path, trials: Mapping[str, On]) -> Iterator[tuple[str, Noise]]:
        """See `Executor.run`."""
        for key, on in trials.items():
            if self._opened is None or self._opened[0] != folder:
                self._opened = (folder, Trials(folder))
            yield key, self._opened[1].noise(on)


class Processes:
    """Runs trials in several processes of this machine, which read the weights from the same file.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._workers: list[subprocess.Popen[str]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._workers.clear()

    def run(self, folder: Path, trials: Mapping[str, On]) -> Iterator[tuple[str, Noise]]:
        """See `Executor.run`."""
        while len(self._workers) < min(self._count, len(trials)):
            command = [sys.executable, "-m", f"{__package__}.trial_worker"]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")  # noqa: S603 - our own module
            self._workers.append(worker)
            self._idle.put(worker)
        with ThreadPoolExecutor(max(1, len(self._workers))) as threads:
            pending = {threads.submit(self._one, folder, on): key for key, on in trials.items()}
            try:
                for done in as_completed(pending):
                    yield pending[done], done.result()
            finally:
                for waiting in pending:
                    waiting.cancel()

    def _one(self, folder: Path, on: On) -> Noise:
        worker = self._idle.get()
        try:
            assert worker.stdin is not None
            assert worker.stdout is not None
            try:
                worker.stdin.write(json.dumps({"folder": str(folder), "on": list(on)}) + "\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
            except OSError:
                line = ""
            if not line:
                raise IsthmusError(
                    f"a process that runs trials ended with exit code {worker.wait()}",
                    hint="it may have been out of memory: give a smaller --jobs; what was found so far is kept",
                )
            answer = json.loads(line)
        finally:
            self._idle.put(worker)
        if "error" in answer:
            raise IsthmusError(answer["error"])
        return tuple(answer["noise"])


class Ray:
    """Runs trials on a Ray cluster, whose machines have isthmus with ONNX Runtime installed. One CPU a trial.

    The files of a folder are put into Ray's object store once; every process of a cluster writes them to a temporary folder of its own.

    Args:
        address: The cluster's, as `ray.init` takes it: `auto`, `ray://HOST:10001`; empty for one that Ray starts on this machine.
        module: The `ray` module, for tests; imported by default.

    Raises:
        MachineError: ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str, *, module: Any = None) -> None:
        if module is None:
            try:
                import ray as module  # type: ignore[import-not-found,no-redef]  # an extra
            except ImportError as error:
                raise MachineError(
                    "--executor ray runs trials with Ray, which is not installed", hint="pip install ray; or leave --executor out"
                ) from error
        self._ray = module
        self._shipped: dict[Path, Any] = {}
        try:
            self._ray.init(address=address or None, log_to_driver=False, ignore_reinit_error=True)
        except Exception as error:  # ConnectionError, ValueError and Ray's own
            raise MachineError(
                f"Ray cannot be reached at {address or 'this machine'}: {str(error).splitlines()[0]}", hint="`ray status` shows a cluster"
            ) from error

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *error: object) -> None:
        self._shipped.clear()
        self._ray.shutdown()

    def run(self, folder: Path, trials: Mapping[str, On]) -> Iterator[tuple[str, Noise]]:
        """See `Executor.run`."""
        if folder not in self._shipped:
            files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
            self._shipped[folder] = self._ray.put(files)
        remote = self._ray.remote(num_cpus=1)(run_shipped)
        pending = {remote.remote(str(folder), self._shipped[folder], list(on)): key for key, on in trials.items()}
        while pending:
            done, _ = self._ray.wait(list(pending), num_returns=1)
            for reference in done:
                try:
                    noise = self._ray.get(reference)
                except Exception as error:  # a task's own exception, or Ray's
                    hint = getattr(getattr(error, "cause", None), "hint", "") or _KEPT
                    raise IsthmusError(f"a trial failed on the Ray cluster: {_cause(error)}", hint=hint) from error
                yield pending.pop(reference), tuple(float(number) for number in noise)


def _cause(error: Exception) -> str:
    """What failed in a task. Ray's own text begins with the task's name and process; the last line of its traceback says it."""
    cause = getattr(error, "cause", None)  # of ray.exceptions.RayTaskError: the exception that the task raised
    if isinstance(cause, IsthmusError):
        return cause.message
    shown = cause if isinstance(cause, Exception) else error
    lines = [line.strip() for line in str(shown).splitlines() if line.strip()]
    if shown is cause:
        return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
    return lines[-1] if lines else type(error).__name__


_KEPT = "what was found so far is kept, and the same call goes on with it"

_opened: dict[str, Trials] = {}


def run_shipped(name: str, files: Mapping[str, bytes], on: On) -> list[float]:
    """Runs a trial on another machine.

    Args:
        name: What tells one folder from another.
        files: Its files by name.
        on: The switches that are on.
    """
    if name not in _opened:
        _opened.clear()
        # ONNX Runtime keeps what it has mapped; the files' names are needed no more.
        with tempfile.TemporaryDirectory(prefix="isthmus-") as temporary:
            for file, data in files.items():
                (Path(temporary) / Path(file).name).write_bytes(data)
            _opened[name] = Trials(Path(temporary))
    return list(_opened[name].noise(on))


def executor(name: str, *, jobs: int, address: str) -> Executor:
    """The executor of a name: `local` or `ray`."""
    if name == "ray":
        return Ray(address)
    return InProcess() if jobs == 1 else Processes(jobs)
