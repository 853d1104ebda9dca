"""What several test files need: the command line in this process and in a child, and one small bundle made once."""

import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click.testing
import pytest

from isthmus.cli import main

Run = Callable[..., click.testing.Result]
Child = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).parent.parent
_COUNT = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file run in one process, because they share what is made once; the sweep's, of one implementation in one process.

    A test that shares nothing names a group of its own.
    """
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        swept = getattr(item, "callspec", None) and item.callspec.params.get("swept")
        item.add_marker(pytest.mark.xdist_group(swept[1] if swept else item.path.relative_to(ROOT).as_posix()))


_SWEPT = 500
"""Tests after which what was set aside is looked through once more."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What earlier tests left is set aside from garbage collection, which coremltools asks for many times in a test: in a process that has
    run some thousand tests each would take seconds.
    """
    count = item.session.stash.get(_COUNT, 0)
    item.session.stash[_COUNT] = count + 1
    if count % _SWEPT == 0:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def _run(*arguments: object) -> click.testing.Result:
    handler = signal.getsignal(signal.SIGTERM)
    logger = logging.getLogger("isthmus")
    level = logger.level
    try:
        return click.testing.CliRunner().invoke(main, [str(a) for a in arguments])
    finally:
        # What the command line sets for its own process.
        signal.signal(signal.SIGTERM, handler)
        logging.disable(logging.NOTSET)
        logger.setLevel(level)
        logger.handlers.clear()


@pytest.fixture
def run() -> Run:
    """The command line in this process: `run("export", "dit-tiny", ...)` gives exit_code, stdout and stderr."""
    return _run


@pytest.fixture
def child(tmp_path: Path) -> Child:
    """The command line, or `code=` (Python), in a child process whose working folder is the test's."""

    def start(*arguments: object, code: str | None = None, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *(("-m", "isthmus.cli") if code is None else ("-c", code)), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "80", "PYTHONWARNINGS": "default"}
        defaults = {"capture_output": True, "text": True, "timeout": 300, "cwd": tmp_path, "env": environment}
        return subprocess.run(command, check=False, **{**defaults, **options})

    return start


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of dit-tiny for ONNX Runtime, made once. Not to be changed: see `bundle`."""
    folder = tmp_path_factory.mktemp("made") / "dit-tiny"
    result = _run("export", "dit-tiny", "--target", "onnxruntime", "-o", folder)
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of a bundle that the test may change."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))
