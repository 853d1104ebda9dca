"""What `isthmus diff` and `isthmus bisect` show as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from isthmus.terminal import print_table

if TYPE_CHECKING:
    from isthmus.calibration.bisect import StageDiff
    from isthmus.calibration.row import Figures, Row
    from isthmus.differences import BisectResult, DiffResult

_OVER = 10  # of the modules over the threshold, how many are shown
_NODES = 8  # of the nodes that a module became
_HIDDEN = 4  # of the modules that are not visible, how many are named for each reason


def print_bisect(result: BisectResult) -> None:
    """The module that first went wrong with what it became, what every stage found, and the modules over the threshold."""
    from isthmus.calibration.bisect import arisen

    manifest, found = result.manifest, result.culprit
    what = f"{manifest.model} for {manifest.target} in {manifest.precision}"
    if found is None:
        ran = [stage for stage in result.stages if stage.rows]
        none = "no stage could be run on this machine, so that nothing is known of its modules: see `isthmus doctor`"
        print(f"{what}: {'no module is over the threshold in any of the stages that were run' if ran else none}")
    else:
        row, stage = found.row, found.stage
        print(f"{what}: {_name(row.module)} ({row.kind}) first went wrong, in stage {stage.name}")
        assert row.injected is not None
        print(f"  injected   {_long(row.injected)}, {_at(row)}; the threshold is {stage.threshold:g}")
        if row.inherited is not None and row.total is not None:
            print(f"  inherited  {_long(row.inherited)}\n  total      {_long(row.total)}")
        print(f"  case       {row.case}\n  nodes      {_nodes(row)}")
    for stage in result.stages:
        print(f"  {stage.name:<12} {_found(stage)}")
    since = arisen(result.stages)
    for stage in result.stages:
        if stage.over:
            count = len(stage.over)
            print(f"\nstage {stage.name}: {count} module{'s' if count != 1 else ''} over {stage.threshold:g}")
            print_table((*_HEADER, "arose in"), [(*_cells(row), since.get(row.module, "-")) for row in stage.over[:_OVER]])
            if len(stage.over) > _OVER:
                print(f"and {len(stage.over) - _OVER} more: --format json has them")
    _print_hidden([stage for stage in result.stages if stage.rows][-1:])


def print_diff(result: DiffResult) -> None:
    """Every module of the artifact, in order, and which of them is over the threshold."""
    stage, other = result.stage, result.other
    print(f"{result.b} against {result.a}: {result.manifest.model}, stage {stage.name}, {_found(stage)}")
    if not stage.rows:
        print("nothing is known of its modules: see `isthmus doctor`")
        return
    if other is not None:
        theirs = {row.module: row for row in other.rows}
        rows = [
            (*_cells(row), _short(theirs[row.module].injected if row.module in theirs else None), _short(result.apart.get(row.module)))
            for row in stage.rows
            if row.visible
        ]
        print_table((*_HEADER, "injected in A", "B against A"), rows)
    else:
        print_table(_HEADER, [_cells(row) for row in stage.rows if row.visible])
    _print_hidden([stage])
    if stage.over:
        first = stage.over[0]
        print(f"first over {stage.threshold:g}: {_name(first.module)} ({first.kind}), {_at(first)}: {_nodes(first)}")


_HEADER = ("module", "kind", "injected", "inherited", "total", "injected SQNR, dB")


def _cells(row: Row) -> tuple[str, ...]:
    injected = row.injected
    ratio = f"{injected.sqnr_db:.1f}" if injected is not None and not injected.problem else "-"
    return (_name(row.module), row.kind, _short(injected), _short(row.inherited), _short(row.total), ratio)


def _found(stage: StageDiff) -> str:
    if not stage.rows:
        return f"not run: {stage.reason}"
    worst, visible = stage.worst, sum(row.visible for row in stage.rows)
    text = f"{visible} of {len(stage.rows)} modules visible, {len(stage.over)} over {stage.threshold:g}"
    return f"{text}; worst {_short(worst.injected)} in {_name(worst.module)}" if worst is not None else text


def _print_hidden(stages: Sequence[StageDiff]) -> None:
    for stage in stages:
        reasons: dict[str, list[str]] = {}
        for row in stage.rows:
            if not row.visible and row.reason:
                reasons.setdefault(row.reason, []).append(_name(row.module))
        for reason, modules in reasons.items():
            rest = f" and {len(modules) - _HIDDEN} more" if len(modules) > _HIDDEN else ""
            prefix = "" if reason.startswith("not run") else "not visible: "
            print(f"{', '.join(modules[:_HIDDEN])}{rest}: {prefix}{reason}")


def _at(row: Row) -> str:
    return f"at its {row.at}" if row.at.startswith("output") else f"at the {row.at}"


def _nodes(row: Row) -> str:
    rest = f" and {len(row.nodes) - _NODES} more" if len(row.nodes) > _NODES else ""
    return (", ".join(row.nodes[:_NODES]) or "none of its own") + rest


def _name(module: str) -> str:
    return module if module and not module.startswith("#") else f"the model itself{module}"


def _short(figures: Figures | None) -> str:
    if figures is None:
        return "-"
    return "broken" if figures.problem else f"{figures.relative_l2:.1e}"


def _long(figures: Figures) -> str:
    if figures.problem:
        return figures.problem
    ratio = f"SQNR {figures.sqnr_db:.1f} dB" if math.isfinite(figures.sqnr_db) else "no error"
    return f"{figures.relative_l2:.2e} of its result, {ratio}, up to {figures.max_abs:.2e}"
