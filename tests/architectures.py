"""Which system of the registry runs where, as the sweep measured it, and the page that says so.

`make architectures` runs the sweep with ISTHMUS_CELLS set to a folder, into which every export of a tiny model writes one JSON file, and
makes `docs/architectures.md` of them::

    python tests/architectures.py out/cells docs/architectures.md
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest

from isthmus.exporter.errors import UnsupportedError
from isthmus.exporter.manifest import Manifest
from isthmus.exporter.spec import MODELS

SYSTEMS: Mapping[str, tuple[str, ...]] = {
    "Sequence mixers": (
        "softmax-attention", "fp8-attention", "linear-attention", "retnet", "paged-attention", "mamba", "mamba2", "rwkv7", "vim",
        "physics-attention",
    ),
    "Diffusion and generation backbones": (
        "dit", "sana", "dc-ae", "diffit", "diffussm", "mmdit", "sdxl-unet", "consistency", "ctm", "aim", "jamba", "mambavision",
        "video-dit",
    ),
    "Representations": ("titok", "fsq", "rvq", "chart-autoencoder", "topology-vae"),
    "Compute units": ("swiglu", "rmsnorm", "moe", "early-exit"),
    "Samplers and dynamics": (
        "rectified-flow", "dpm-solver", "neural-ode", "neural-diffusion", "hamiltonian-generative", "hamiltonian-flow", "sinkhorn", "jko",
        "schrodinger-bridge",
    ),
}  # fmt: skip
"""The stems of the systems that have to be there: sizes and forms follow after a hyphen (`mamba-tiny`, `mamba-step-tiny`, `mamba-130m`)."""

STEMS = tuple(stem for stems in SYSTEMS.values() for stem in stems)

CELLS = (("onnxruntime", "fp32"), ("tensorrt", "fp16"), ("tensorrt-rtx", "fp16"), ("coreml", "fp16"), ("coreai", "fp16"))
"""The targets, and the precision in which each takes every tiny model."""


TINY = sorted((name for name in MODELS if name.endswith("-tiny")), key=lambda name: (len(name), name))
"""The models that are swept."""


def marks_of(name: str, *, quick: bool, first: bool = True) -> tuple[pytest.MarkDecorator, ...]:
    """When a sweep runs for a model: in `make test` if it is quick, else in `make matrix`, of which .ci/run takes the first form of each
    system, or none of them where `first` is False.
    """
    if quick:
        return ()
    return (pytest.mark.matrix,) if first and name in FIRST else (pytest.mark.matrix, pytest.mark.full)


@dataclass(frozen=True)
class Refusal:
    """A target that cannot have a model, and says so.

    Attributes:
        operator: What the refusal must name.
        why: Why the target cannot have it.
        kind: Control flow and sorting are what compilers of fixed graphs lack; anything else is an exception that has to stay rare.
    """

    operator: str
    why: str
    kind: Literal["control flow", "sorting", "other"]


REFUSALS: Mapping[tuple[str, str], Refusal] = {}
"""By model and target. The sweep holds that the export is refused, and that it names the operator."""


@dataclass(frozen=True)
class Cell:
    """What came of one export.

    Attributes:
        model: Registered name.
        target: Registered name.
        precision: Of the export.
        verdict: Of the bundle; `refused` when there is none.
        stage: The last stage that was executed, whose error this is.
        max_relative: Largest |error| over the reference's range, of all outputs and cases; 0 when nothing was executed.
        psnr_db: Smallest PSNR of all floating point outputs and cases; 0 when nothing was executed.
        reason: Why it was refused.
    """

    model: str
    target: str
    precision: str
    verdict: str
    stage: str = ""
    max_relative: float = 0.0
    psnr_db: float = 0.0
    reason: str = ""


def cell_of(manifest: Manifest) -> Cell:
    """The cell of a bundle: its last executed stage, and the worst of that."""
    stage = [s for s in manifest.stages if s.metrics][-1]
    return Cell(
        manifest.model,
        manifest.target,
        manifest.precision,
        manifest.verdict,
        stage.name,
        max(m.max_relative for m in stage.metrics),
        min(m.psnr_db for m in stage.metrics),
    )


def refused(model: str, target: str, precision: str, error: UnsupportedError) -> Cell:
    """The cell of a refusal."""
    return Cell(model, target, precision, "refused", reason="; ".join(str(reason) for reason in error.reasons) or str(error))


def record(cell: Cell) -> None:
    """Writes the cell when ISTHMUS_CELLS names a folder."""
    if folder := os.environ.get("ISTHMUS_CELLS"):
        path = Path(folder) / f"{cell.model}--{cell.target}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(cell), indent=1) + "\n")


def read(folder: Path) -> list[Cell]:
    """The cells of a folder."""
    return [Cell(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def stem_of(model: str) -> str:
    """The system of a model: the longest stem that its name begins with; for one that is none of them, its name without the size."""
    return max((stem for stem in STEMS if model.startswith(f"{stem}-")), key=len, default=model.rpartition("-")[0])


FIRST = frozenset({stem_of(name): name for name in reversed(TINY)}.values())
"""One form of each system."""


def page(cells: Iterable[Cell]) -> str:
    """`docs/architectures.md`."""
    by_model: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        by_model.setdefault(cell.model, {})[cell.target] = cell
    lines = [_INTRODUCTION.strip(), ""]
    heads = [f"{target} {precision}" for target, precision in CELLS]
    others = tuple(dict.fromkeys(stem for stem in map(stem_of, sorted(by_model)) if stem not in STEMS))
    for title, stems in {**SYSTEMS, **({"Others": others} if others else {})}.items():
        lines += [f"## {title}", "", f"| system | {' | '.join(heads)} |", f"|---|{'---|' * len(CELLS)}"]
        for stem in stems:
            forms = sorted((m for m in by_model if stem_of(m) == stem), key=lambda m: (len(m), m))
            texts = [_worst([by_model[m][target] for m in forms if target in by_model[m]]) for target, _ in CELLS]
            lines.append(f"| **{stem}** ({', '.join(f'`{m}`' for m in forms)}) | {' | '.join(texts)} |")
        lines.append("")
    lines += ["## Each form", "", f"| model | {' | '.join(heads)} |", f"|---|{'---|' * len(CELLS)}"]
    order = (*STEMS, *others)
    for model in sorted(by_model, key=lambda m: (order.index(stem_of(m)), len(m), m)):
        texts = [_text(by_model[model][target]) if target in by_model[model] else "not swept" for target, _ in CELLS]
        lines.append(f"| `{model}` | {' | '.join(texts)} |")
    lines += ["", "## Refusals", ""]
    lines += [
        f"- `{model}` on {target} ({refusal.kind}): `{refusal.operator}`. {refusal.why}" for (model, target), refusal in REFUSALS.items()
    ] or ["None."]
    return "\n".join(lines) + "\n"


_INTRODUCTION = """
# Every architecture on every target

Made by `make architectures` from the exports of the sweep (`tests/test_small_models.py`); not to be edited. Each system is a registered
model in a tiny size, which the sweep exports with random weights, and in its published sizes (`isthmus list models`).

A cell says what was done here and how far the result was from PyTorch in float32: in fp32 the largest error over the range of the output,
in fp16 the smallest PSNR in dB, over all outputs and inputs. The `onnx` stage of TensorRT is its graph in ONNX Runtime; engines of
TensorRT are compiled on the machine with the GPU, those of TensorRT-RTX were built here. Nothing here ran on a GPU or on an Apple
device: not run. "exact" means bit for bit equal. A system's row shows the worst of its forms.
"""


def _text(cell: Cell) -> str:
    if cell.verdict == "refused":
        return "refused"
    if not cell.stage:
        return cell.verdict
    if cell.precision == "fp32":
        error = f"{cell.max_relative:.1e}" if cell.max_relative else "exact"
    else:
        error = f"{cell.psnr_db:.1f} dB" if math.isfinite(cell.psnr_db) else "exact"
    return f"{cell.verdict}, {error}" + (f" ({cell.stage})" if cell.verdict in ("lowered", "built") else "")


def _badness(cell: Cell) -> float:
    """Of the number that is shown: of several cells the largest is the worst."""
    return cell.max_relative if cell.precision == "fp32" else -cell.psnr_db


def _worst(cells: list[Cell]) -> str:
    executed = [cell for cell in cells if cell.verdict != "refused"]
    if not executed:
        return "refused" if cells else "not swept"
    worst = max(executed, key=_badness)
    return _text(worst) + (f"; {len(cells) - len(executed)} of {len(cells)} forms refused" if len(executed) < len(cells) else "")


if __name__ == "__main__":
    source, destination = map(Path, sys.argv[1:])
    destination.write_text(page(read(source)))
