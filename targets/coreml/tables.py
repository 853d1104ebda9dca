"""The tables of the report: what was compressed, how near values come to float16's largest number, and what runs on the Neural Engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...exporter.manifest import Column, Table
from .interpreter import Observed, peaks

_MOST = 24
"""Rows of the head room's table: the largest values are what may overflow."""


def compression(done: Sequence[Mapping[str, Any]]) -> tuple[Table, ...]:
    """What `compression.compress` did with each weight; none for a model that was not compressed."""
    if not done:
        return ()
    kept = sum("how" not in entry for entry in done)
    return (
        Table(
            name="compression",
            title="Compression",
            lead=f"{len(done) - kept} tensors are compressed, and {kept} stay as they are, for the reasons given.",
            columns=(
                Column(name="Tensor", kind="code"),
                Column(name="Operation", kind="code"),
                Column(name="Shape"),
                Column(name="Bits", kind="count"),
                Column(name="How, or why not"),
            ),
            rows=tuple(
                (
                    str(entry["name"]),
                    str(entry["operation"]),
                    " x ".join(map(str, entry.get("shape", ()))) or None,
                    int(entry["bits"]),
                    str(entry.get("how") or entry["reason"]),
                )
                for entry in done
            ),
        ),
    )


def head_room(ranges: Mapping[str, Observed], modules: Mapping[str, str], precision: str) -> tuple[Table, ...]:
    """The largest values of the program at the example; none for float32, and where nothing was observed."""
    if precision == "fp32" or not ranges:
        return ()
    rows = [(name, seen) for name, seen in peaks(ranges) if seen.dtype == "float16"]
    worst = rows[0][1].head_room if rows else math.inf
    return (
        Table(
            name="head-room",
            title="Head room of float16",
            lead=f"How many times larger a value could become before it overflows at 65504, at the example's inputs; "
            f"{'no value is computed in float16' if not rows else f'{worst:.3g} times at the least'}. "
            f"The {min(_MOST, len(rows))} largest of {len(rows)} values.",
            columns=(
                Column(name="Value", kind="code"),
                Column(name="Operation", kind="code"),
                Column(name="PyTorch module", kind="code"),
                Column(name="Largest |value|", kind="number"),
                Column(name="Head room", kind="number"),
            ),
            rows=tuple(
                (name, seen.operation, modules.get(name, ""), _finite(seen.peak), _finite(seen.head_room)) for name, seen in rows[:_MOST]
            ),
        ),
    )


def engine(share: Any) -> tuple[Table, ...]:
    """The share of the floating-point operations that is likely on the Neural Engine (`rules.engine.Share`)."""
    from .rules.engine import share_table

    return (share_table(share),)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
