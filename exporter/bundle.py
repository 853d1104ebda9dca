"""The bundle: a folder that holds an artifact, its evidence and its manifest.

Layout (schema version 1)::

    manifest.json            what this is; sha256 of every other file
    model.onnx, …            the artifact, as the target writes it
    reference/inputs.npz     every case's inputs, keys `case/name`
    reference/outputs.npz    PyTorch's outputs for them, keys `case/name`
    calibration.json         what was observed on calibration data, where the precision needs that
    report.json, report.html the accuracy report

It is written as a whole; see `exporter.destination`. Nothing in it is a pickle, and nothing that is loaded from it is.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic import ValidationError

from .arrays import save_arrays
from .destination import write_whole
from .errors import IntegrityError, Reason, UsageError
from .manifest import MANIFEST, SCHEMA_VERSION, Manifest

INPUTS = "reference/inputs.npz"
OUTPUTS = "reference/outputs.npz"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hashes every file of `folder` and writes `manifest.json`, the last file of a bundle. Returns the manifest with the hashes."""
    files = {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST}
    complete = manifest.model_copy(update={"files": files})
    write_text(folder / MANIFEST, complete.model_dump_json(by_alias=True, indent=2) + "\n")
    return complete


def write_text(path: Path, text: str) -> None:
    """Writes a text into a bundle that is being written; what was at the path may be a link to another bundle's file."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def replace_file(folder: Path, manifest: Manifest, name: str, content: bytes) -> Manifest:
    """Replaces one file of a written bundle, and its hash in the manifest; every other hash stays as it is. Returns the new manifest.

    Raises:
        IsthmusError: The bundle cannot be written.
    """
    files = {**manifest.files, name: hashlib.sha256(content).hexdigest()}
    complete = manifest.model_copy(update={"files": files})
    text = complete.model_dump_json(by_alias=True, indent=2) + "\n"
    for path, data in ((folder / name, content), (folder / MANIFEST, text.encode())):
        write_whole(path, data, hint="free some space, or copy the bundle to where you can write")
    return complete


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of the bundle in `folder`; checks nothing but its form.

    Raises:
        UsageError: The folder is not there or holds no manifest.
        IntegrityError: The manifest is not one that this version understands.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"{folder} is not a bundle: it holds no {MANIFEST}", hint="give the folder that `isthmus export -o` wrote")
    if path.stat().st_size > 64 * 2**20:
        raise IntegrityError(f"{path} is larger than 64 MiB and was not read")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise IntegrityError(
            f"{path} is not a manifest of schema {SCHEMA_VERSION}: {where}: {first['msg']}", hint="export again"
        ) from error
    if manifest.schema_ != SCHEMA_VERSION:
        raise IntegrityError(
            f"{path} has schema {manifest.schema_}, expected {SCHEMA_VERSION}", hint="export again with this version of isthmus"
        )
    return manifest


def inside(folder: Path, name: str) -> Path | None:
    """The path of a bundle's file by its name in the manifest; None when the name leads out of the bundle."""
    pure = PurePosixPath(name)
    path = folder / pure
    if pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(folder.resolve()):
        return None
    return path


def check_integrity(folder: Path, manifest: Manifest, *, trusted: Collection[str] = ()) -> None:
    """Compares every file of the bundle with its manifest.

    Args:
        folder: The bundle's folder.
        manifest: Its manifest.
        trusted: Names of files that the caller takes as they are, whatever the manifest says of them.

    Raises:
        IntegrityError: Files are changed, missing or additional, or a path leads out of the bundle; all are listed.
    """
    reasons = []
    for name, expected in manifest.files.items():
        path = inside(folder, name)
        if path is None:
            reasons.append(Reason("the path leads out of the bundle", where=name))
        elif not path.is_file():
            reasons.append(Reason("the file is missing", where=name))
        elif name not in trusted and (got := sha256_of(path)) != expected:
            reasons.append(Reason(f"sha256 is {got}, expected {expected}", where=name))
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    reasons += [Reason("the file is not in the manifest", where=name) for name in sorted(present - set(manifest.files) - set(trusted))]
    if reasons:
        raise IntegrityError(f"the bundle {folder} is not what its manifest says", reasons=reasons, hint="export again, or copy it again")


def write_cases(path: Path, cases: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]) -> None:
    """Writes tensors of several cases to one `.npz`, keys `case/name`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{case}/{name}": array for case, tensors in cases.items() for name, array in tensors.items()}
    save_arrays(path, arrays)


def read_cases(path: Path, *, limit_bytes: int = 16 * 2**30) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """Reads what `write_cases` wrote: case to name to array, in the order written.

    Raises:
        IntegrityError: The file is damaged, larger than `limit_bytes` unpacked, or holds a pickled object.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
            if size > limit_bytes:
                raise IntegrityError(f"{path} unpacks to {size} bytes, expected at most {limit_bytes}")
            for info in archive.infolist():  # numpy allocates what the header says before it reads
                if (needed := _array_bytes(archive, info)) > info.file_size:
                    raise IntegrityError(f"{path}: {info.filename} says {needed} bytes and holds {info.file_size}", hint="export again")
        cases: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        with np.load(path, allow_pickle=False) as data:
            for key in data.files:
                case, _, name = key.partition("/")
                cases.setdefault(case, {})[name] = data[key]
    except (ValueError, OSError, zipfile.BadZipFile, KeyError) as error:
        raise IntegrityError(f"{path} cannot be read as tensors: {error}", hint="export again") from error
    return cases


def _array_bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)  # type: ignore[no-untyped-call]  # untyped
        read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        return int(math.prod(shape) * dtype.itemsize)
