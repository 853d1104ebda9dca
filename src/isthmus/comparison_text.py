"""What `isthmus report A B --compare` shows as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.calibration.wording import change, decibel, share, size
from isthmus.terminal import print_table

if TYPE_CHECKING:
    from isthmus.calibration.compare import Comparison, Side


def print_comparison(comparison: Comparison) -> None:
    """The two bundles, every figure that both have, what differs in how they were made, and what became worse."""
    for name, side in (("A", comparison.a), ("B", comparison.b)):
        print(f"{name}  {_side(side)}")
    print()
    shown = [f for f in comparison.figures if f.change is not None]
    print_table(
        ("stage", "case", "output", "dB", "A", "B", "change"),
        [
            (f.stage, f.case, f.output, f.metric.removesuffix("_db").upper(), decibel(f.a or 0.0), decibel(f.b or 0.0), change(f.change))
            for f in shown
        ],
    )
    if one_sided := len(comparison.figures) - len(shown):
        print(f"and {one_sided} figures of stages, cases or outputs that only one of them has")
    for what, rows in (("option", comparison.options), ("tool", comparison.versions)):
        for name, a, b in rows:
            print(f"{what} {name}: A {a or '-'}, B {b or '-'}")
    for note in comparison.notes:
        print(f"note: {note}")
    for reason in comparison.regressions:
        print(f"regression: {reason}")
    if not comparison.regressions:
        print(f"no regression: no figure fell by more than {comparison.threshold:g} dB, and no verdict is weaker")


def _side(side: Side) -> str:
    m = side.manifest
    covered = "" if side.coverage is None else f", {share(round(side.coverage * 10**6), 10**6)} in FP8"
    return f"{side.folder}: {m.model} for {m.target} in {m.precision}: {m.verdict}, {size(side.size)}{covered}"
