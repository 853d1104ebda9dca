"""Builds `libisthmus_trt.so`, and the host that stands in for TensorRT in tests, into a folder that is named after its contents."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...errors import IsthmusError, MachineError
from ...op import OPS
from ..gpu.compile import ARCHITECTURES, cache_folder
from . import headers
from .tables import Tables, generate

HERE = Path(__file__).parent
LIBRARY = "libisthmus_trt.so"
HOST = "libisthmus_trt_host.so"

_SOURCES = ("driver.cpp", "launch.cpp", "plugin.cpp", "sizes.cpp")
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra")
_LINKED = ("-shared", "-pthread", "-Wl,--no-undefined", "-Wl,-z,noexecstack")


def build(
    root: Path | None = None,
    architectures: Sequence[str] = tuple(ARCHITECTURES),
    operators: Iterable[str] | None = None,
    compiler: str | None = None,
) -> Path:
    """Builds the plugin library, or takes it from the cache.

    Args:
        root: TensorRT's folder; see `headers.find`.
        architectures: Keys of `gpu.compile.ARCHITECTURES`, for which the kernels are compiled and put into the library. None: it holds
            none, and serves to record launches and to build plans for other machines.
        operators: Only these; all that have a TensorRT part by default.
        compiler: C++ compiler; that of CXX, or the system's, by default.

    Returns:
        The library's path, in a folder of the user's cache.

    Raises:
        MachineError: There is no compiler, no header or no Triton.
        IsthmusError: The compiler failed, or a plan is wrong.
    """
    wanted = None if operators is None else set(operators)
    chosen = tuple(OPS[name] for name in OPS if OPS[name].has("tensorrt") and (wanted is None or name in wanted))
    include = headers.find(root)
    tables = generate(chosen, architectures)
    own = [HERE / name for name in _SOURCES] + [op.folder / "tensorrt.cpp" for op in chosen]
    return _build(LIBRARY, own, include, compiler, tables)


def build_host(root: Path | None = None, compiler: str | None = None) -> Path:
    """Builds the host: see `host.Host`. Raises like `build`."""
    return _build(HOST, [HERE / "host.cpp"], headers.find(root), compiler, Tables())


def state() -> tuple[bool, str, str]:
    """Whether the library can be built here, what that rests on, and what to do when it cannot: for `isthmus list ops`. Never raises."""
    try:
        compiler, include = find_compiler(), headers.find()
    except MachineError as error:
        return False, error.message, error.hint
    detail = f"builds with {Path(compiler).name} and the headers in {include}; its launches in Triton's interpreter; on a GPU: not run"
    return True, detail, ""


def find_compiler(named: str | None = None) -> str:
    """The C++ compiler's path.

    Raises:
        MachineError: There is none.
    """
    for name in [named] if named else [os.environ.get("CXX") or "", "c++", "g++", "clang++"]:
        if name and (path := shutil.which(name)):
            return path
    raise MachineError(f"there is no C++ compiler{f' {named!r}' if named else ''}", hint="install g++ 9 or newer, or set CXX to its path")


def _build(name: str, own: Sequence[Path], include: Path, compiler: str | None, tables: Tables) -> Path:
    path = find_compiler(compiler)
    version = subprocess.run([path, "--version"], capture_output=True, timeout=60, check=False).stdout  # noqa: S603 - found on PATH
    folder = cache_folder().parent / "tensorrt"
    folder.mkdir(parents=True, exist_ok=True)
    # Our stand-in for the CUDA header comes before any other, so that every machine builds the same.
    includes = ["-I", str(HERE), "-isystem", str(HERE / "include"), "-isystem", str(include)]
    shared = _digest(version, sys.platform, _FLAGS, *_contents((*HERE.glob("*.h"), *HERE.glob("include/*.h"), *include.glob("NvInfer*.h"))))

    def compiled(file: str, contents: bytes, command_file: str, extra: Mapping[str, bytes]) -> Path:
        key = _digest(shared, file, contents, sorted(extra.items()))
        command = [path, *_FLAGS, *includes, "-c", command_file, "-o", "object.o"]
        return _made(folder / "objects" / key, "object.o", command, {**extra, **({file: contents} if command_file == file else {})})

    objects = [compiled(source.name, source.read_bytes(), str(source), {}) for source in own]
    if tables.source:
        objects.append(compiled("tables.cpp", tables.source.encode(), "tables.cpp", {}))
        objects.append(compiled("images.S", tables.assembly.encode(), "images.S", tables.files))
    command = [path, *_LINKED, "-o", name, *map(str, objects), "-ldl"]
    return _made(folder / _digest(shared, _LINKED, [o.parent.name for o in objects]), name, command, {})


def _made(folder: Path, name: str, command: Sequence[str], files: Mapping[str, bytes]) -> Path:
    """What a command makes from some files, in a folder that appears whole or not at all."""
    if (folder / name).is_file():
        return folder / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        for file, contents in files.items():
            (scratch / file).write_bytes(contents)
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=900, check=False)  # noqa: S603 - our own
        if done.returncode:
            raise IsthmusError(f"{name} could not be made: {command[0]} failed with {done.returncode}\n{done.stderr.strip()}")
        for file in files:
            (scratch / file).unlink()
        (scratch / "warnings.txt").write_text(done.stderr, "utf-8")
        try:
            scratch.replace(folder)
        except OSError:  # another process was first, with the same contents
            if not (folder / name).is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder / name


def _contents(paths: Iterable[Path]) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted(paths)]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
