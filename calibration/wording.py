"""The words and figures of the report: one sentence for the verdict, and how numbers are written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any

from ..exporter.manifest import Manifest, OutputMetrics, StageResult
from ..exporter.spec import Tolerance
from .metrics import misses

REFERENCE_STAGES = ("torch", "torch-dtype")
"""Stages that execute PyTorch, and say nothing of the artifact."""


def tolerance_of(manifest: Manifest, stage: StageResult, metrics: OutputMetrics) -> Tolerance:
    """The bounds that one row of a stage was held to; an empty tolerance for pictures that were drawn and not judged."""
    if metrics.case == "samples":
        return Tolerance(**(stage.sample_tolerance or {}))
    return Tolerance(**(manifest.tolerance if stage.tolerance is None else stage.tolerance))


def headline(manifest: Manifest) -> str:
    """The verdict in one sentence that claims no more than was executed here. Numbers are rounded to the side that keeps it true."""
    executed = [s for s in manifest.stages if s.name not in REFERENCE_STAGES and s.verdict in ("verified", "failed") and s.metrics]
    last = executed[-1] if executed else None
    culprit = next((s for s in manifest.stages if s.verdict == manifest.verdict), None)
    if manifest.verdict == "failed" and culprit is not None:
        return f"Executed here on {culprit.device or 'this machine'}, and not close enough to PyTorch: {_worst_miss(manifest, culprit)}."
    if manifest.verdict == "blocked" and culprit is not None:
        return f"The stage {culprit.name} could not be executed, so nothing is claimed about it: {_clause(culprit.reason)}."
    if manifest.verdict in ("built", "lowered"):
        did = "compiled here by the vendor's tools" if manifest.verdict == "built" else "checked statically"
        start = f"Not executed on {manifest.device or 'its device'}: it was {did}"
        return f"{start}; its {last.name} form, executed on {last.device}, is {_distance(last)}." if last else f"{start}, and nothing more."
    if manifest.verdict == "verified":
        if last:
            return f"Executed here on {last.device}: {_distance(last)}."
        return "Only PyTorch was executed here, so nothing is claimed about the artifact's accuracy."
    return "Nothing was executed here, so nothing is claimed about the artifact's accuracy."


def _distance(stage: StageResult) -> str:
    rows = [m for m in stage.metrics if m.case != "samples"]
    if not rows:
        return "no output was compared with PyTorch's"
    inputs = len({m.case for m in rows})
    sizes = len({tuple(m.shape for m in rows if m.case == case) for case in {m.case for m in rows}})
    over = f"over {inputs} {_plural('input', inputs)} at {sizes} {_plural('size', sizes)}"
    worst = max(m.max_relative for m in rows)
    if worst == 0:
        return f"no difference from PyTorch, {over}"
    if not math.isfinite(worst):  # a constant reference has no range to measure by
        largest = max(m.max_abs for m in rows)
        return f"at most {_rounded_up(largest)} away from PyTorch in absolute value, {over}"
    return f"at most {_rounded_up(worst)} of the output's range away from PyTorch, {over}"


def _worst_miss(manifest: Manifest, stage: StageResult) -> str:
    found = [(miss, m) for m in stage.metrics for miss in misses(m, tolerance_of(manifest, stage, m))]
    if not found:
        return _clause(stage.reason) or "no reason was recorded"
    miss, m = max(found, key=lambda pair: pair[0].severity)
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{miss.text} (stage {stage.name}, case {m.case}, output {m.output}){more}"


def _clause(text: str) -> str:
    return text.strip().removesuffix(".")


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _rounded_up(value: float) -> str:
    """Two significant digits, never less than the value: `at most` stays true."""
    if not math.isfinite(value):
        return number(value)
    return number(float(Context(prec=2, rounding=ROUND_CEILING).create_decimal(Decimal(value))))


def number(value: float) -> str:
    """Three significant digits: `0.0213`, `1.24e-7`, `∞`; a dash for NaN."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        places = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:.{places}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def decibel(value: float) -> str:
    """One decimal, without the unit."""
    return f"{value:.1f}" if math.isfinite(value) else number(value)


def at_least_decibel(value: float) -> str:
    """One decimal, rounded downwards, with the unit."""
    return f"{math.floor(value * 10) / 10:.1f} dB" if math.isfinite(value) else f"{number(value)} dB"


def cosine(value: float) -> str:
    """Near 1, what is missing to it: `1 − 3.1e-9`."""
    if value == 1 or not value > 0.99:
        return number(value)
    return f"1 − {number(1 - value)}"


def count(value: int) -> str:
    """With narrow no-break spaces between the thousands."""
    return f"{value:,}".replace(",", "\u202f")


def size(value: int) -> str:
    """Bytes in a binary unit."""
    amount, unit = float(value), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{value} B" if unit == "B" else f"{number(amount)} {unit}"


def shape(value: Sequence[int | str]) -> str:
    """`2 × 4 × 32 × 32`."""
    return " × ".join(str(d) for d in value) or "scalar"


def share(part: int, whole: int) -> str:
    """Per cent without decimals; what would round to 0 or to 100 and is neither says so."""
    if part == 0:
        return "0"
    percent = 100 * part / whole
    return "<1 %" if percent < 1 else ">99 %" if 99 < percent < 100 else f"{percent:.0f} %"


def bounds(tolerance: Tolerance) -> str:
    """The bounds that are set, in words."""
    parts = []
    if tolerance.max_relative is not None:
        parts.append(f"max |error| / range ≤ {number(tolerance.max_relative)}")
    if tolerance.min_psnr is not None:
        parts.append(f"PSNR ≥ {number(tolerance.min_psnr)} dB")
    if tolerance.atol is not None or tolerance.rtol is not None:
        parts.append(f"|error| ≤ {number(tolerance.atol or 0)} + {number(tolerance.rtol or 0)} · |reference|")
    return ", ".join(parts) or "none"


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of `outer.inner` and text, in the order given."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _text(value)))
    return rows


def _text(value: object) -> str:
    if value is None or value in ((), [], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
        return f"{len(value)} {'entry' if len(value) == 1 else 'entries'}, in manifest.json"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return json.dumps(value, default=str) if isinstance(value, Mapping) else str(value)


def cell(value: str | float | None, kind: str) -> str:
    """A value of a `Table`, by the kind of its column."""
    if value is None:
        return "–"
    if kind in ("text", "code"):
        return str(value)
    if kind == "share":
        return share(round(float(value) * 10**6), 10**6)
    if kind in ("count", "size"):
        return {"count": count, "size": size}[kind](int(value))
    return {"number": number, "decibel": decibel}[kind](float(value))


def ratio(value: float) -> str:
    """A share from 0 to 1, in per cent with two significant digits."""
    return "0" if value == 0 else f"{number(float(f'{100 * value:.2g}'))} %"


def similarity(value: float) -> str:
    """Structural similarity: near 1, what is missing to it, as `1 − 2e-6`; 1 from where on that is roundoff."""
    if abs(1 - value) < 1e-7:
        return "1"
    return cosine(value) if value >= 0.99995 else f"{value:.4f}" if math.isfinite(value) else number(value)


def sort_key(value: float | None) -> str:
    """A number as JavaScript reads it; empty for what comes last in every order."""
    if value is None or math.isnan(value):
        return ""
    return repr(value) if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def change(value: float | None, unit: str = "") -> str:
    """A difference with its sign, one decimal; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:+.1f}" if math.isfinite(value) else f"{'+' if value > 0 else '-'}∞"
    return f"{text.replace('-', '−')}{unit}"


FILTERS: Mapping[str, Callable[..., Any]] = {
    "number": number,
    "decibel": decibel,
    "at_least_decibel": at_least_decibel,
    "cosine": cosine,
    "count": count,
    "size": size,
    "shape": shape,
    "cell": cell,
    "ratio": ratio,
    "ssim": similarity,
    "sort_key": sort_key,
    "px": lambda value: f"{value:.2f}".rstrip("0").rstrip("."),
    "change": change,
    "share": share,
    "bounds": bounds,
    "flat": flat,
}
