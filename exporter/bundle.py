"""The bundle: a folder that holds an artifact, its evidence and its manifest.

Layout (schema version 1)::

    manifest.json            what this is; sha256 of every other file
    model.onnx, …            the artifact, as the target writes it
    reference/inputs.npz     every case's inputs, keys `case/name`
    reference/outputs.npz    PyTorch's outputs for them, keys `case/name`
    calibration.json         what was observed on calibration data, where the precision needs that
    report.json, report.html the accuracy report

A bundle is written into a hidden folder beside its destination and renamed into place, so that an interrupted export leaves nothing
that looks finished. Nothing in it is a pickle, and nothing that is loaded from it is.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from .errors import IntegrityError, IsthmusError, Reason, UsageError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
INPUTS = "reference/inputs.npz"
OUTPUTS = "reference/outputs.npz"

Verdict = Literal["verified", "built", "lowered", "blocked", "failed", "not run"]
"""What may be claimed of a stage: executed here and within tolerance; accepted by the vendor's compiler here; static checks only;
could not be executed although it should (see the reason); executed here and outside tolerance; and not run at all."""

_LINKED = 2**20
"""Bytes from which on `rewriting` links a file."""

_WEAKEST_FIRST: tuple[Verdict, ...] = ("failed", "blocked", "lowered", "built", "verified")

# JSON has neither inf nor nan: they are written as the strings "inf", "-inf" and "nan". A perfect match has an infinite PSNR.
Decibel = Annotated[float, PlainSerializer(lambda x: x if np.isfinite(x) else str(x), when_used="json")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OutputMetrics(_Strict):
    """How far one output of one case is from PyTorch's. All errors are artifact - reference, computed in float64.

    Attributes:
        case: `example`, `second`, or a case at another size; `samples` for pictures drawn end to end.
        output: The output's name.
        shape: Its shape.
        max_abs: max |error|.
        mean_abs: mean |error|.
        range: max(reference) - min(reference).
        max_relative: max_abs / range (inf when the range is 0 and there is an error, 0 when there is none).
        relative_l2: ||error|| / ||reference||.
        cosine: Cosine of the angle between the two, as vectors.
        sqnr_db: 10 log10(sum reference^2 / sum error^2), dB.
        psnr_db: 20 log10(range / rms(error)), dB.
        problem: Why the numbers cannot be trusted (NaN, Inf, a different shape or dtype); empty when they can.
        integer: True for integers and booleans, which have to be equal unless --atol or --rtol is given.
        histogram: Counts of log10(|error| / range) in bins of one decade, from `HISTOGRAM_EDGES`; the first also counts exact zeros.
        excess: max of |error| / (atol + rtol |reference|), at most 1 within these bounds; None where neither was set.
    """

    case: str
    output: str
    shape: tuple[int, ...]
    max_abs: Decibel
    mean_abs: Decibel
    range: Decibel
    max_relative: Decibel
    relative_l2: Decibel
    cosine: Decibel
    sqnr_db: Decibel
    psnr_db: Decibel
    problem: str = ""
    integer: bool = False
    histogram: tuple[int, ...] = ()
    excess: Decibel | None = None


HISTOGRAM_EDGES: tuple[int, ...] = tuple(range(-9, 2))
"""Decades of |error| / range: below 1e-9, 1e-9 to 1e-8, …, 1 to 10, above. `len(histogram) == len(HISTOGRAM_EDGES) + 1`."""


class StageResult(_Strict):
    """What one verification stage found.

    Attributes:
        name: `torch`, `torch-dtype`, `onnx`, `native`, `quantized`, `sampler`, `plan`, `mil`, `coreai` or `device`.
        verdict: See `Verdict`.
        reason: Why the verdict is not `verified`; empty when it is.
        metrics: One row for each case and output.
        device: What executed it.
        tolerance: The bounds that its outputs were held to; None for the manifest's.
        sample_tolerance: The bounds that its pictures (case `samples`) were held to; None when there were none.
    """

    name: str
    verdict: Verdict
    reason: str = ""
    metrics: tuple[OutputMetrics, ...] = ()
    device: str = ""
    tolerance: dict[str, float] | None = None
    sample_tolerance: dict[str, float] | None = None


class TensorInfo(_Strict):
    """One input or output of the artifact.

    Attributes:
        name: Its name.
        dtype: numpy's name for its element type.
        shape: Sizes; a string names a dynamic size.
        range: Smallest and largest value seen in the reference cases, None for empty or boolean tensors.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    range: tuple[Decibel, Decibel] | None = None


class Column(_Strict):
    """One column of a `Table`.

    Attributes:
        name: Its heading.
        kind: How its values are written: `text`, `code`, `count` (integers), `number`, `size` (bytes), `decibel`, or `share` (0 to 1, a
            bar).
    """

    name: str
    kind: Literal["text", "code", "count", "number", "size", "decibel", "share"] = "text"


class Table(_Strict):
    """Figures that a target gives the report.

    Attributes:
        name: A short name of letters and hyphens, unique in the report.
        title: What people read above it.
        lead: One or two sentences on what it shows.
        columns: Its columns.
        rows: Its rows, with a value for each column; None where there is none.
    """

    name: Annotated[str, Field(pattern=r"\A[a-z][a-z0-9-]*\z")]
    title: str
    lead: str = ""
    columns: tuple[Column, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]

    @model_validator(mode="after")
    def _full(self) -> Table:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"the table {self.name} has a row of another length than {len(self.columns)}")
        return self


class WeightsInfo(_Strict):
    """Where the weights came from.

    Attributes:
        origin: `shipped`, `file`, `random` or `module` (the caller's own module).
        path: The file's name, without its folder; empty where there is none.
        layout: `isthmus` or the foreign layout that was converted.
        dtypes: Element types in the file, by safetensors' names (`F32`, `BF16`, …); floats are converted to the module's type.
        sha256: Of the file, or of the parameters' bytes where there is no file.
        parameters: Number of parameters and buffers' elements.
        bytes: Their size in bytes.
        seed: The seed of random weights.
        missing: Keys the module has and the file has not.
        unexpected: Keys the file has and the module has not.
    """

    origin: Literal["shipped", "file", "random", "module"]
    path: str = ""
    layout: str = "isthmus"
    dtypes: tuple[str, ...] = ()
    sha256: str = ""
    parameters: int = 0
    bytes: int = 0
    seed: int | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


class Manifest(_Strict):
    """The contents of `manifest.json`.

    Attributes:
        schema_: Version of this layout (`schema` in the file).
        model: The name asked for.
        target: The target's registered name.
        precision: The precision asked for.
        opset: ONNX opset of the lowered graph, None for targets without one.
        config: The model's settings.
        options: Every option of the export, as resolved.
        inputs: The artifact's inputs, in order.
        outputs: Its outputs, in order.
        sizes: Ranges of the dynamic sizes: name to (min, opt, max).
        weights: Where the weights came from.
        tolerance: The bounds that the verdict was given by.
        device: What the artifact is for.
        verdict: The weakest verdict of the stages that were run.
        stages: What each stage found.
        versions: Versions of the tools that made it.
        details: Figures of the target.
        files: Path (POSIX, relative) to sha256, for every file but the manifest.
    """

    schema_: int = Field(default=SCHEMA_VERSION, alias="schema", serialization_alias="schema")
    model: str
    target: str
    precision: str
    opset: int | None = None
    config: dict[str, Any] = {}
    options: dict[str, Any] = {}
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    sizes: dict[str, tuple[int, int, int]] = {}
    weights: WeightsInfo
    tolerance: dict[str, float] = {}
    device: str = ""
    verdict: Verdict
    stages: tuple[StageResult, ...]
    versions: dict[str, str] = {}
    details: dict[str, Any] = {}
    files: dict[str, str] = {}


def weakest(stages: Iterable[StageResult]) -> Verdict:
    """The weakest verdict of the stages that were run.

    Stages of PyTorch itself say nothing of the artifact: when only they were run, the verdict is at most `lowered`; when none was, it
    is `not run`.
    """
    ran = [s for s in stages if s.verdict != "not run"]
    verdicts: list[Verdict] = [s.verdict for s in ran]
    if ran and all(s.name in ("torch", "torch-dtype") for s in ran):
        verdicts.append("lowered")
    return min(verdicts, key=_WEAKEST_FIRST.index, default="not run")


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Replaces one file of a written bundle, and its hash in the manifest; every other hash stays as it is. Returns the new manifest."""
    files = {**manifest.files, name: hashlib.sha256(content).hexdigest()}
    complete = manifest.model_copy(update={"files": files})
    text = complete.model_dump_json(by_alias=True, indent=2) + "\n"
    for path, data in ((folder / name, content), (folder / MANIFEST, text.encode())):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        temporary.write_bytes(data)
        temporary.replace(path)
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
    np.savez(path, allow_pickle=False, **arrays)


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
        version = np.lib.format.read_magic(member)  # type: ignore[no-untyped-call]
        read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        return int(math.prod(shape) * dtype.itemsize)
