"""What this machine can do with each part of an operator: the facts behind `isthmus list ops`.

Nothing heavy is imported: packages are looked for, and native libraries on the disk.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..op import PARTS, CustomOp

State = Literal["runs", "simulated", "missing", "none"]

MEANINGS: dict[State, str] = {
    "runs": "executed by what it is written for",
    "simulated": "executed by a stand-in here; on its device: not run",
    "missing": "a package or library is not here; the fix is given",
    "none": "cannot exist; the reason is given",
}


@dataclass(frozen=True)
class PartState:
    """What this machine can do with one part of one operator.

    Attributes:
        state: One of `MEANINGS`.
        detail: What was found, what is missing, or why the part cannot exist.
        fix: What to install or to call; empty unless something is missing.
    """

    state: State
    detail: str
    fix: str = ""


def part_states(op: CustomOp) -> dict[str, PartState]:
    """The state of every part, in the order of `PARTS`."""
    return {part: _state(op, part) for part in PARTS}


def _state(op: CustomOp, part: str) -> PartState:
    if part in op.lacks:
        return PartState("none", op.lacks[part])
    if not op.has(part):
        return PartState("missing", f"{op.name}/{PARTS[part].file} is not there", "reinstall isthmus")
    return _PROBES[part]() if part in _PROBES else PartState("runs", "numpy")


def _packages(names: tuple[str, ...], found: PartState, extra: str = "") -> PartState:
    """`found` where all the packages are installed."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if not absent:
        return found
    return PartState("missing", f"{' and '.join(absent)} is not installed", f"pip install 'isthmus[{extra}]'" if extra else "")


def _onnxruntime() -> PartState:
    from .native import state

    available, detail, fix = state()
    if not available:
        return PartState("missing", detail, fix)
    return _packages(("onnxruntime",), PartState("runs", detail), "cpu")


def _tensorrt() -> PartState:
    from .plugin.build import state

    available, detail, fix = state()
    return _packages(("triton",), PartState("simulated", detail), "kernels") if available else PartState("missing", detail, fix)


def _tensorrt_quick() -> PartState:
    if importlib.util.find_spec("tensorrt") is None:
        what = "its launches in Triton's interpreter; the package tensorrt is not installed, the plugin itself: not run"
    else:
        what = "its launches in Triton's interpreter"
    return _packages(("triton",), PartState("simulated", what), "kernels")


_PROBES: dict[str, Callable[[], PartState]] = {
    "torch": lambda: _packages(("torch",), PartState("runs", "torch")),
    "onnx": lambda: _packages(("onnxruntime",), PartState("runs", "onnxruntime"), "cpu"),
    "onnx27": lambda: _packages(("onnxruntime",), PartState("runs", "onnxruntime"), "cpu"),
    "onnxruntime": _onnxruntime,
    "gpu": lambda: _packages(("triton",), PartState("simulated", "Triton's interpreter; compiled ahead of time"), "kernels"),
    "tensorrt": _tensorrt,
    "tensorrt-quick": _tensorrt_quick,
    "coreml": lambda: _packages(("coremltools",), PartState("simulated", "an interpreter of ML Programs"), "coreml"),
    "coreai": lambda: _packages(("coreai_torch",), PartState("simulated", "Core AI's CPU run time"), "coreai"),
}
