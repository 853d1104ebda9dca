"""The folder of a search's graphs and weights. It lies beside the recipe, so that the next search finds what a killed one left."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..exporter.errors import IsthmusError


@contextlib.contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """Gives the path of a folder `.NAME.PID.trials` beside the output, which is for the block to make and is removed when the block ends.

    A process that is killed leaves its folder. It is removed here, by the next one with the same output, once its maker runs no more. What
    is no folder, or a link to one, is not touched.

    Args:
        output: The file that the search writes.

    Raises:
        IsthmusError: The folder cannot be made there.
    """
    output = output.absolute()
    # Cut, so that a long name leaves room for the rest: most file systems end at 255 bytes.
    start, end = f".{output.name[:48]}.", ".trials"
    folder = output.with_name(f"{start}{os.getpid()}{end}")
    for left in output.parent.glob(f"{glob.escape(start)}*{end}"):
        pid = left.name[len(start) : -len(end)]
        if pid.isdecimal() and not left.is_symlink() and left.is_dir() and not _in_use(left, int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    there = next(parent for parent in folder.parents if parent.exists())
    if folder.is_symlink() or folder.exists():
        raise IsthmusError(f"{folder} is in the way of the folder for the trials", hint="remove it, or give another -o")
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise IsthmusError(f"cannot write into {there}", hint="give a folder that you can write with -o")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path, pid: int) -> bool:
    """Whether a process may be the one that made a folder. This one has made none yet."""
    if pid == os.getpid() or not psutil.pid_exists(pid):
        return False
    try:
        # Numbers are given out again: a process that began after the last change to the folder did not make it.
        return psutil.Process(pid).create_time() <= folder.stat().st_mtime
    except (psutil.Error, OSError):
        return psutil.pid_exists(pid)
