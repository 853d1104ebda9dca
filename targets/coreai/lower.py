"""Writes the asset of a model, and what the report says of it."""

from __future__ import annotations

from pathlib import Path

from ...exporter.passes.half_precision import overflowing
from ...exporter.target import Job, Lowered
from .convert import convert
from .half import ToHalf
from .options import CoreAIOptions
from .prepare import expand, prepare

SYSTEMS = "iOS 27 and macOS 27"


def lower(job: Job[CoreAIOptions], path: Path) -> Lowered:
    """Writes `job.program` to `path` in the precision asked for.

    Raises:
        IsthmusError: The conversion fails.
    """
    program = prepare(job.program)
    notes: list[str] = []
    if job.precision == "fp16":
        to_half = ToHalf(program, overflowing(job.peaks))
        program = to_half()
        notes.append(to_half.summary())
    counts = convert(
        expand(program),
        path,
        inputs=job.input_names,
        outputs=job.output_names,
        description=f"Exported from PyTorch with isthmus, {job.precision}",
        timeout=job.options.timeout,
    )
    return Lowered(
        device=f"Core AI, {SYSTEMS} and later",
        notes=tuple(notes),
        details={
            "operations": sum(counts.values()),
            "operators": dict(sorted(counts.items())),
            "file_bytes": sum(file.stat().st_size for file in path.iterdir()),
        },
    )
