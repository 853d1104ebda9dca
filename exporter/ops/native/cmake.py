"""Builds `libisthmus_ops` with CMake, and keeps it in a cache folder under a name that says what it was built from."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ...errors import IsthmusError, MachineError
from ...op import OPS, CustomOp
from .schemas import header, tables

HERE = Path(__file__).parent
COMMAND = "python -m isthmus.exporter.ops.native"
_MINUTES = 20
_SUFFIX = {"Darwin": ".dylib"}.get(platform.system(), ".so")


def library() -> Path | None:
    """The built library for these sources, this compiler and these flags, or None. One that was built from anything else is not found.

    The environment variable ISTHMUS_CACHE_DIR names the folder that libraries are kept in; the default is the user's cache folder.
    """
    path = _path(os.environ.get("ISTHMUS_CACHE_DIR", ""), os.environ.get("CXX", ""), os.environ.get("CXXFLAGS", ""))
    return path if path is not None and path.is_file() else None


def state() -> tuple[bool, str, str]:
    """Whether the library is there, what was found, and what to do when it is not: for `isthmus doctor`. Never raises."""
    try:
        _tools()
        path = library()
    except IsthmusError as error:
        return False, f"{error.message}; function bodies and the torch form are used", error.hint
    if path is None:
        return False, "libisthmus_ops is not built for these sources; function bodies and the torch form are used", COMMAND
    from .binding import load

    try:
        levels = load(path).levels()
    except IsthmusError as error:
        return False, error.message, error.hint
    return True, f"{path.name}, {levels[0]}", ""


def build(*, force: bool = False) -> Path:
    """Builds the library unless it is there, and returns its path.

    Args:
        force: Build it also when it is there.

    Raises:
        MachineError: There is no CMake or no C++ compiler.
        IsthmusError: The build failed; the compiler's errors are in the message.
    """
    _tools()
    found = library()
    if found is not None and not force:
        return found
    path = _path(os.environ.get("ISTHMUS_CACHE_DIR", ""), os.environ.get("CXX", ""), os.environ.get("CXXFLAGS", ""))
    assert path is not None  # `_tools` found a compiler
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the folder of the destination: a rename across file systems would not be atomic.
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
        built = compile_into(Path(folder))
        built.replace(path)
    return path


def compile_into(folder: Path, *options: str) -> Path:
    """Generates, configures and compiles in `folder`; returns the library's path there.

    Args:
        folder: An existing folder, kept as it is left: objects are under it.
        options: More options of CMake (`-DNAME=VALUE`).

    Raises:
        MachineError: There is no CMake.
        IsthmusError: The build failed.
    """
    cmake = shutil.which("cmake")
    if cmake is None:
        raise MachineError("CMake is not installed, so the native kernels cannot be built", hint=_hint())
    ops = _native_ops()
    generated = folder / "generated"
    generated.mkdir(exist_ok=True)
    (generated / "schemas.h").write_text(header(ops), encoding="utf-8")
    (generated / "schemas.cpp").write_text(tables(ops), encoding="utf-8")
    kernels = ";".join(str((op.folder / "kernel.cpp").resolve()) for op in ops)
    configure = [cmake, "-S", str(HERE.resolve()), "-B", str(folder / "cmake"), f"-DISTHMUS_GENERATED={generated}"]
    _run([*configure, f"-DISTHMUS_KERNELS={kernels}", *options])
    _run([cmake, "--build", str(folder / "cmake"), "--parallel", str(os.cpu_count() or 1)])
    (built,) = (folder / "cmake").glob("libisthmus_ops.*")
    return built


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 * _MINUTES)  # noqa: S603 - our own arguments
    except subprocess.TimeoutExpired as error:
        raise IsthmusError(f"building the native kernels took more than {_MINUTES} minutes") from error
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise IsthmusError("building the native kernels failed:\n" + "\n".join(lines[-20:]), hint=f"the command was: {' '.join(command)}")


def _native_ops() -> list[CustomOp]:
    return [OPS[name] for name in OPS if OPS[name].has("onnxruntime")]


def _tools() -> None:
    missing = [
        name for name, found in (("CMake", shutil.which("cmake")), ("a C++ compiler", _compiler(os.environ.get("CXX", "")))) if not found
    ]
    if missing:
        raise MachineError(f"{' and '.join(missing)} not found, so the native kernels cannot be built", hint=_hint())


def _hint() -> str:
    install = "xcode-select --install, and brew install cmake" if sys.platform == "darwin" else "apt-get install cmake g++"
    return f"{install}, or name the compiler in CXX; then {COMMAND}"


@functools.cache
def _compiler(cxx: str) -> str | None:
    """The compiler that CMake takes, or None."""
    for name in [cxx] if cxx else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    return None


@functools.cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - found on PATH
    return done.stdout


@functools.lru_cache(maxsize=16)
def _path(cache: str, cxx: str, flags: str) -> Path | None:
    """Where the library for these settings belongs; None when there is no compiler. Sources are read once a process."""
    compiler = _compiler(cxx)
    if compiler is None:
        return None
    ops = _native_ops()
    sources = sorted(p for p in HERE.iterdir() if p.suffix in (".cpp", ".h", ".txt"))
    digest = hashlib.sha256()
    parts = [_version(compiler), compiler, flags, platform.machine(), header(ops), tables(ops)]
    parts += [p.read_text(encoding="utf-8") for p in (*sources, *(op.folder / "kernel.cpp" for op in ops))]
    for part in parts:
        digest.update(hashlib.sha256(part.encode()).digest())
    return _cache(cache) / f"libisthmus_ops-{digest.hexdigest()[:20]}{_SUFFIX}"


def _cache(named: str) -> Path:
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "isthmus"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus"
