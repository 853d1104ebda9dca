"""What this machine is, and what it can do for each target: the facts behind `isthmus doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from .target import Capability, Target

_PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "numpy", "safetensors")


@dataclass(frozen=True)
class MachineReport:
    """What was found.

    Attributes:
        facts: Versions and sizes in words, by name.
        targets: What each target can do here.
        can_lower: True when at least one target can lower a model.
    """

    facts: Mapping[str, str]
    targets: Mapping[str, tuple[Capability, ...]]
    can_lower: bool

    def value(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "facts": dict(self.facts),
            "targets": {name: [asdict(c) for c in capabilities] for name, capabilities in self.targets.items()},
            "can_lower": self.can_lower,
        }


def examine(targets: Iterable[type[Target[Any]]]) -> MachineReport:
    """Imports what isthmus needs, and asks every target what it can do. Never raises for what is missing."""
    facts = {"python": f"{platform.python_version()} on {platform.platform(terse=True)}"}
    facts |= {name: _version(name) for name in _PACKAGES}
    memory = psutil.virtual_memory()
    facts["cores"] = f"{psutil.cpu_count(logical=False) or '?'} physical, {psutil.cpu_count() or '?'} logical"
    facts["memory"] = f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"
    for name, folder in (("disk here", Path.cwd()), ("disk temp", Path(tempfile.gettempdir()))):
        facts[name] = f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free in {folder}"
    capabilities = {cls.name: tuple(cls().capabilities()) for cls in targets}
    broken = [name for name in ("torch", "onnx", "onnx_ir", "onnxscript") if facts[name].startswith("missing")]
    can_lower = not broken and any(c.name == "lower" and c.available for found in capabilities.values() for c in found)
    return MachineReport(facts=facts, targets=capabilities, can_lower=can_lower)


def _version(module: str) -> str:
    try:
        importlib.import_module(module)
        return importlib.metadata.version(module.replace("_", "-"))
    except Exception as error:  # an installed library can fail in any way when it is loaded
        return f"missing ({type(error).__name__}: {str(error).partition(chr(10))[0]}); fix: pip install {module.replace('_', '-')}"
