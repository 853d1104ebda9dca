"""NVIDIA's two libraries: which is installed, which GPU is here, and what the compiling process needs in its environment."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...exporter.ops.gpu.compile import cache_folder
from .recipe import Library

MODULES: Mapping[Library, tuple[str, ...]] = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
"""The names that a library's Python module may have."""

INSTALL: Mapping[Library, str] = {
    "tensorrt": "pip install tensorrt (11.0 or newer, Linux, with NVIDIA's driver)",
    "tensorrt-rtx": "pip install 'isthmus[tensorrt-rtx]' (Linux)",
}

OLDEST: Mapping[Library, int] = {"tensorrt": 11}
"""The first version that builds strongly typed networks only, and so takes the precision from the graph."""

_DISTRIBUTIONS: Mapping[Library, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt_cu13_bindings"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt_rtx_cu13_bindings"),
}
_MISSING_LINK = "libtensorrt_rtx.so"


def installed_version(library: Library) -> str:
    """The version of an installed library, found without importing it; empty when it is not installed."""
    if not any(_found(module) for module in MODULES[library]):
        return ""
    for name in _DISTRIBUTIONS[library]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "of an unknown version"


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a module without a specification, or whose package fails
        return False


@dataclass(frozen=True)
class Gpu:
    """The GPU that CUDA uses first.

    Attributes:
        name: As its driver calls it.
        capability: Its compute capability, such as `9.0`.
    """

    name: str
    capability: str


def find_gpu(driver: Any = None) -> Gpu | None:
    """The GPU of this machine; None where there is none, or no driver. Never raises.

    Args:
        driver: The CUDA driver's library; the system's by default.
    """
    if driver is None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR are 75 and 76 (cuda.h).
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    return None if failed else Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}")


def child_environment(library: Library) -> dict[str, str]:
    """The environment of a process that uses the library: this one's, with this package and the library's files to be found in it."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(_import_root()), *filter(None, [os.environ.get("PYTHONPATH")])])
    if library == "tensorrt-rtx" and (links := missing_links()) is not None:
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(links), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    return environment


def _import_root() -> Path:
    """The folder on the path from which this package is imported."""
    package = sys.modules[__name__.partition(".")[0]]
    assert package.__file__ is not None
    return Path(package.__file__).absolute().parent.parent


def missing_links(libraries: Path | None = None) -> Path | None:
    """A folder with the link that the wheel of TensorRT-RTX lacks; None where nothing is missing.

    The parser opens `libtensorrt_rtx.so` when it meets a plugin, and the wheel (1.7.1) holds `libtensorrt_rtx.so.1` alone: the process
    ends with "terminate called without an active exception". To be dropped when the wheel has the link.

    Args:
        libraries: The folder of the library's files; the installed one by default.
    """
    if libraries is None:
        spec = importlib.util.find_spec("tensorrt_rtx_libs") if _found("tensorrt_rtx_libs") else None
        if spec is None or spec.origin is None:
            return None
        libraries = Path(spec.origin).parent
    existing = libraries / f"{_MISSING_LINK}.1"
    if (libraries / _MISSING_LINK).exists() or not existing.exists():
        return None
    folder = cache_folder().parent / "tensorrt-rtx" / sha256(str(existing).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / _MISSING_LINK
    if not link.is_symlink() or link.readlink() != existing:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / _MISSING_LINK
            made.symlink_to(existing)
            made.replace(link)
    return folder


def timing_cache(recipe_path: str, version: str, gpu: Gpu) -> Path:
    """The file that keeps the builder's measurements: the recipe's, or one for this version and GPU in the user's cache folder."""
    if recipe_path:
        return Path(recipe_path).expanduser()
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{version}-{gpu.name}")
    return cache_folder().parent / "tensorrt" / f"timing-{name}.cache"
