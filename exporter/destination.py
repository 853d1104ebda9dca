"""Writes folders and files whole or not at all: into a hidden one beside the destination, which is renamed into place.

What is interrupted leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from .errors import IsthmusError, UsageError
from .manifest import MANIFEST

_LINKED = 2**20
"""Bytes from which on `rewriting` links a file."""


def check_destination(destination: Path, *, force: bool, marker: str = MANIFEST, kind: str = "bundle") -> None:
    """Refuses a destination that cannot be written, before any work is done; clears what killed exports left beside it.

    Args:
        destination: The folder to be.
        force: Replace one that exists.
        marker: The file by which a folder of this kind is known.
        kind: What such a folder is called.

    Raises:
        UsageError: It exists and `force` is not given; or it exists and is not of this kind, which `force` does not replace either.
        IsthmusError: Its parent folder cannot be written.
    """
    _remove_leftovers(destination.absolute())
    if destination.is_symlink() or destination.exists():
        if not force:
            raise UsageError(f"the output {destination} exists", hint="give --force to replace it, or another -o")
        if not (destination / marker).is_file() and (not destination.is_dir() or any(destination.iterdir())):
            raise UsageError(
                f"the output {destination} exists and is not a {kind}, so --force does not replace it",
                hint="remove it yourself, or give another -o",
            )
    parent = destination.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise IsthmusError(f"cannot write into {parent}: {error.strerror}", hint="give a folder that you can write with -o") from error


@contextlib.contextmanager
def writing(destination: Path, *, force: bool, marker: str = MANIFEST, kind: str = "bundle") -> Iterator[Path]:
    """Gives a folder to write the bundle's files into, and puts it in place of `destination` when the block ends well.

    The arguments are those of `check_destination`.

    A block that raises leaves no trace. A process that is killed leaves a hidden folder (`.NAME.PID.partial`) without a manifest, which
    the next export to the same destination removes.

    Raises:
        UsageError, IsthmusError: See `check_destination`; and when the disk is full.
    """
    check_destination(destination, force=force, marker=marker, kind=kind)
    destination = destination.absolute()
    partial = destination.parent / _hidden(destination, os.getpid(), "partial")
    try:
        partial.mkdir()
        yield partial
        if destination.exists() or destination.is_symlink():
            # A folder cannot be replaced in one step: the old one steps aside, and comes back if the rename fails.
            aside = destination.parent / _hidden(destination, os.getpid(), "replaced")
            destination.rename(aside)
            try:
                partial.rename(destination)
            except OSError:
                aside.rename(destination)
                raise
            shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()
        else:
            partial.rename(destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(destination.parent).free
            raise IsthmusError(
                f"cannot write the {kind} into {destination.parent}: {error.strerror} ({free / 2**20:.0f} MiB free)",
                hint="free some space, or give a folder on another disk with -o",
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def rewriting(bundle: Path) -> Iterator[Path]:
    """Gives a copy of a bundle to change, and puts it in the bundle's place when the block ends well.

    Large files are not copied but linked: they may be replaced in the copy, and not written to.

    Raises:
        IsthmusError: See `writing`.
    """
    with writing(bundle, force=True) as folder:
        for path in sorted(bundle.rglob("*")):
            to = folder / path.relative_to(bundle)
            if path.is_dir():
                to.mkdir()
            elif path.stat().st_size < _LINKED:
                shutil.copy2(path, to)
            else:
                try:
                    os.link(path, to)
                except OSError:  # a file system without links
                    shutil.copy2(path, to)
        yield folder


def _hidden(destination: Path, pid: int | str, what: str) -> str:
    # The name is cut, so that a long one leaves room for the rest: most file systems end at 255 bytes.
    return f".{destination.name[:48]}.{pid}.{what}"


def _remove_leftovers(destination: Path) -> None:
    """Removes what killed exports to this destination left; puts back a bundle that was killed between its two renames."""
    for what in ("replaced", "partial"):
        for folder in destination.parent.glob(glob.escape(_hidden(destination, "", "").removesuffix("..")) + f".*.{what}"):
            pid = folder.name.removesuffix(f".{what}").rsplit(".", 1)[-1]
            # A process of our own number can only be an earlier one: this one has written nothing yet.
            if not pid.isdecimal() or (int(pid) != os.getpid() and psutil.pid_exists(int(pid))):
                continue
            if what == "replaced" and not destination.exists():
                folder.rename(destination)
            elif folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, *, hint: str = "give another -o, or free some space") -> None:
    """Writes a file and, where it is missing, its folder. A file that is there is replaced in one step.

    Args:
        path: The file.
        content: Its bytes; a text is written as UTF-8.
        hint: What people can do where it cannot be written.

    Raises:
        IsthmusError: It cannot be written.
    """
    path = path.absolute()
    partial = path.parent / _hidden(path, os.getpid(), "partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where the folder is a file, it is another error than a missing one
            partial.unlink()
        raise IsthmusError(f"cannot write {path}: {error.strerror}", hint=hint) from error


def check_space(folder: Path, weight_bytes: int) -> None:
    """Refuses a disk on which weights do not fit.

    Args:
        folder: A folder on the disk.
        weight_bytes: The size of the weights as they will be written.

    Raises:
        IsthmusError: They do not fit.
    """
    free = shutil.disk_usage(folder).free
    needed = weight_bytes + 16 * 2**20
    if free < needed:
        raise IsthmusError(
            f"the disk of {folder.parent} has {free / 2**20:.0f} MiB free, and the bundle needs about {needed / 2**20:.0f} MiB",
            hint="free some space, or give a folder on another disk with -o",
        )
