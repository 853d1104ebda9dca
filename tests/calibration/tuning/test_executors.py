"""Where trials run: in this process, in several, and on a cluster of Ray."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from isthmus.calibration.executors import InProcess, Processes, Ray, executor, run_shipped
from isthmus.calibration.trials import Trials
from isthmus.exporter.errors import IsthmusError, MachineError

# Beside the other files that read the graph of `conftest.py`, which is made once a process.
pytestmark = pytest.mark.xdist_group("tuning")


def test_processes_find_what_one_process_finds(folder):
    asked = {f"{i}": [i] for i in range(4)}
    with Processes(2) as several, InProcess() as one:
        assert dict(several.run(folder, asked)) == dict(one.run(folder, asked))
        workers = [worker.pid for worker in several._workers]
        assert len(set(workers)) == 2
        with pytest.raises(IsthmusError, match="cannot be run"):
            dict(several.run(folder / "none", {"x": [0]}))
        for worker in several._workers:
            worker.kill()
        with pytest.raises(IsthmusError, match="ended with exit code -9"):
            dict(several.run(folder, {"x": [0]}))
    assert not several._workers


class FakeRay(types.SimpleNamespace):
    """The calls of Ray that are used, in this process: what `ray.put` gives is a reference, which a task gets the value of."""

    def __init__(self) -> None:
        super().__init__(objects={}, calls=[], closed=False)

    def init(self, **options):
        if options["address"] == "ray://nowhere:1":
            raise ConnectionError("could not connect\nmore")
        self.calls.append(options)

    def put(self, value):
        self.objects[f"ref{len(self.objects)}"] = value
        return f"ref{len(self.objects) - 1}"

    def remote(self, **options):
        self.calls.append(options)

        def decorate(function):
            def submit(*arguments):
                values = [self.objects.get(a, a) if isinstance(a, str) else a for a in arguments]
                try:
                    return self.put((True, function(*values)))
                except Exception as error:
                    return self.put((False, error))

            return types.SimpleNamespace(remote=submit)

        return decorate

    def wait(self, references, num_returns):
        return references[-num_returns:], references[:-num_returns]

    def get(self, reference):
        good, value = self.objects[reference]
        if not good:
            raise value
        return value

    def shutdown(self):
        self.closed = True


def test_trials_on_ray_find_what_one_process_finds(folder):
    ray = FakeRay()
    asked = {f"{i}": [i] for i in range(3)}
    with Ray("auto", module=ray) as cluster, InProcess() as one:
        expected = dict(one.run(folder, asked))
        assert dict(cluster.run(folder, asked)) == expected
        assert dict(cluster.run(folder, {"0": [0]})) == {"0": expected["0"]}
        assert sum(isinstance(value, dict) for value in ray.objects.values()) == 1  # the weights are sent once
        assert ray.calls[:2] == [{"address": "auto", "log_to_driver": False, "ignore_reinit_error": True}, {"num_cpus": 1}]
    assert ray.closed
    with Ray("", module=FakeRay()) as cluster, pytest.raises(IsthmusError, match="a trial failed on the Ray cluster"):
        dict(cluster.run(folder.parent, {"0": [0]}))
    with pytest.raises(MachineError, match="cannot be reached at ray") as error:
        Ray("ray://nowhere:1", module=FakeRay())
    assert error.value.message == "Ray cannot be reached at ray://nowhere:1: could not connect"


class TaskError(Exception):
    """As Ray's: its text begins with the task and goes on with a traceback; the exception of the task is its cause."""

    def __init__(self, cause: Exception | None, text: str = "") -> None:
        super().__init__(f'ray::run_shipped() (pid=7, ip=10.0.0.1)\n  File "x.py", line 1\n{text}\n')
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (TaskError(IsthmusError("the trials cannot be run: no such file")), "the trials cannot be run: no such file", "goes on with it"),
        (TaskError(MachineError("onnxruntime is missing", hint="pip install it")), "onnxruntime is missing", "pip install it"),
        (TaskError(ValueError("bad\nmore")), "ValueError: bad", "goes on with it"),
        (TaskError(None, "ray.exceptions.OutOfMemoryError: killed"), "ray.exceptions.OutOfMemoryError: killed", "goes on with it"),
        (RuntimeError(), "RuntimeError", "goes on with it"),
    ],
)
def test_what_failed_on_ray_is_said(folder, monkeypatch, error, message, hint):
    ray = FakeRay()

    def get(reference):
        raise error

    monkeypatch.setattr(ray, "get", get)
    with Ray("auto", module=ray) as cluster, pytest.raises(IsthmusError) as caught:
        dict(cluster.run(folder, {"0": [0]}))
    assert caught.value.message == f"a trial failed on the Ray cluster: {message}"
    assert hint in caught.value.hint


def test_files_of_another_machine_stay_in_their_folder(tmp_path, folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run_shipped("a", {**files, "../outside": b""}, [0]) == list(Trials(folder).noise([0]))
    assert not list(Path(tmp_path).parent.glob("outside"))


def test_ray_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MachineError, match="which is not installed") as error:
        executor("ray", jobs=1, address="auto")
    assert "pip install ray" in error.value.hint
    assert isinstance(executor("local", jobs=1, address=""), InProcess)
    assert isinstance(executor("local", jobs=2, address=""), Processes)
