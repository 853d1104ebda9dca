"""What the command line shows: progress on stderr; results on stdout, as text, tables or JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.analysing import AnalysisResult
    from isthmus.calibrating import CalibrateResult
    from isthmus.embedding import EmbedResult
    from isthmus.exporter.manifest import StageResult
    from isthmus.findings import LintReport
    from isthmus.results import BuildResult, ExportResult, VerifyResult
    from isthmus.tuning import TuneResult

_MODULES = 10  # of those that are not wholly in FP8, or on the Neural Engine, how many are named
_UNCOUNTED = 4  # of the products whose sizes are not known, how many are named


class Progress:
    """Shows named steps on stderr: a spinner on a terminal, one line for each finished step elsewhere."""

    def __init__(self) -> None:
        # The stream of this moment: while a step runs, the libraries' stderr is redirected.
        self._stream = sys.stderr
        self._silent = logging.getLogger("isthmus").getEffectiveLevel() > logging.INFO and logging.getLogger("isthmus").level != 0
        self._depth = 0

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Shows the step as long as the block runs, and then how long it took."""
        started = time.perf_counter()
        self._depth += 1
        try:
            with self._spinner(title) if self._depth == 1 else contextlib.nullcontext():
                yield
        finally:
            self._depth -= 1
        if not self._silent:
            print(f"{'  ' * self._depth}{title} ({time.perf_counter() - started:.1f} s)", file=self._stream, flush=True)

    def _spinner(self, title: str) -> contextlib.AbstractContextManager[object]:
        if self._silent or not self._stream.isatty():
            return contextlib.nullcontext()
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        console = Console(file=self._stream)
        return Live(
            Spinner("dots", title), console=console, transient=True, refresh_per_second=8, redirect_stdout=False, redirect_stderr=False
        )


def print_json(value: Any) -> None:
    """One JSON object."""
    print(json.dumps(value, indent=2, allow_nan=False, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with lines on a terminal; aligned columns, never cut, elsewhere."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_operators(operators: Sequence[Mapping[str, Any]]) -> None:
    """One row a part and one column an operator, then what the words mean, and what is missing or cannot be, each fact once."""
    from isthmus.exporter.op import PARTS
    from isthmus.exporter.ops.state import MEANINGS

    columns = {o["name"]: o["parts"] for o in operators}
    print_table(("part", *columns), [(part, *(parts[part]["state"] for parts in columns.values())) for part in PARTS])
    seen = {state["state"] for parts in columns.values() for state in parts.values()}
    print()
    for word, meaning in MEANINGS.items():
        if word in seen:
            print(f"{word}: {meaning}")
    facts: dict[tuple[str, str, str], list[str]] = {}
    for name, parts in columns.items():
        for part, state in parts.items():
            facts.setdefault((part, state["detail"], state["fix"]), []).append(name)
    print()
    for (part, detail, fix), names in sorted(facts.items(), key=lambda item: list(PARTS).index(item[0][0])):
        who = "" if len(names) == len(columns) else f" of {', '.join(names)}"
        print(f"{part}{who}: {detail}" + (f"; fix: {fix}" if fix else ""))


def print_export(result: ExportResult) -> None:
    """The verdict of every stage, and where the bundle and its report are."""
    manifest = result.manifest
    print(f"{manifest.model} for {manifest.target} in {manifest.precision}: {manifest.verdict}")
    _print_stages(manifest.stages)
    if result.bundle is None:
        print("a dry run: nothing was written")
    else:
        print(f"bundle: {result.bundle}\nreport: {result.bundle / 'report.html'}")
    for warning in result.warnings:
        print(f"warning: {warning}")


def print_verified(result: VerifyResult) -> None:
    """The verdict of every stage that was run again."""
    print(f"{result.bundle}: its files are what the manifest says, and it is {result.verdict}")
    _print_stages(result.stages)


def print_analysed(result: AnalysisResult) -> None:
    """Every figure of PyTorch and of the artifact, and where the page is."""
    report = result.report
    print(f"{report.rows} rows (seed {report.seed}), PyTorch against stage {report.stage} on {report.device}:")
    print_table(
        ("analysis", "of", "figure", "PyTorch", "artifact", "may differ by"),
        [
            (
                row.analysis,
                row.of or "all outputs",
                row.figure + (f", {row.unit}" if row.unit else ""),
                f"{row.reference:.6g}",
                f"{row.artifact:.6g}" + ("" if row.holds else "  MISSED"),
                "-" if row.allowance is None else f"{row.allowance:.1e}",
            )
            for row in report.figures
        ],
    )
    print(f"report: {result.bundle / 'report.html'}")


def print_built(result: BuildResult) -> None:
    """What the build made of every stage that it changed."""
    manifest = result.manifest
    print(f"{result.bundle}: {manifest.model} for {manifest.device or manifest.target}: {manifest.verdict}")
    _print_stages(result.stages)


def print_calibrated(result: CalibrateResult) -> None:
    """Where the table is, what it was made of, and the values that change the most over the timesteps."""
    table = result.table
    print(f"{result.path}: {len(table.values)} values of {table.model}, {table.method} over {table.data.sets} sets of {table.data.source}")
    drifting = sorted(((seen.drift, name) for name, seen in table.values.items() if seen.drift is not None), reverse=True)
    for drift, name in drifting[:3]:
        print(f"  {name}: {drift:.2f} times as large at some timesteps as at others")
    for warning in result.warnings:
        print(f"warning: {warning}")


def tell_trials(done: int, expected: int, left: float | None) -> None:
    """How many trials of a search are done, and the time that is left: one line that changes on a terminal; elsewhere a line for every
    tenth of them.
    """
    logger = logging.getLogger("isthmus")
    if logger.level != 0 and logger.getEffectiveLevel() > logging.INFO:
        return
    text = f"trial {done} of about {expected}" + (f", {left:.0f} s left" if left is not None else "")
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="\n" if done == expected else "", file=sys.stderr, flush=True)
    elif done % max(1, expected // 10) == 0:
        print(f"  {text}", file=sys.stderr, flush=True)


def print_tuned(result: TuneResult) -> None:
    """What was chosen, what it gives, and where the files are."""
    chosen, uniform = result.value["chosen"], result.value["uniform"]
    recipe = result.recipe
    drawn = f", PSNR of the pictures {chosen['psnr_db']:.2f} dB" if chosen["psnr_db"] is not None else ""
    drawn += f", their LPIPS-style distance {chosen['lpips_style']:.3g}" if chosen["lpips_style"] is not None else ""
    print(f"{result.path}: {chosen['flop_share']:.1%} of the operations in {recipe.precision}: SQNR {chosen['sqnr_db']:.2f} dB{drawn}")
    print(f"  {len(chosen['modules'])} of {len(result.value['modules'])} modules; {recipe.calibration_method}, {recipe.weight_rounding}")
    print(f"  all of them, with ranges of the largest values: {uniform['flop_share']:.1%}, SQNR {uniform['sqnr_db']:.2f} dB")
    print(f"  {result.trials} trials, {result.known} of them known from an earlier call")
    for warning in result.warnings:
        print(f"warning: {warning}")


def print_embedded(result: EmbedResult) -> None:
    """Where the program is, and what was not done with it."""
    manifest = result.manifest
    print(f"{result.path}: {result.name}, {manifest.model} for {manifest.target} in {result.language}, {len(result.files)} files")
    for note in result.notes:
        print(f"  {note}")


def print_findings(report: LintReport) -> None:
    """A line for each finding; the share of FP8, or of the Neural Engine, with what lacks it; and the number of findings."""
    for finding in report.findings:
        print(finding)
    engine = report.engine
    if engine is not None:
        print(f"Neural Engine{f' of {engine.chip}' if engine.chip else ''}: likely {engine.share:.1%} of {engine.flops / 1e9:.4g} GFLOP")
        parts = engine.modules or engine.operators
        _print_shares("module" if engine.modules else "operation", "likely", [(part.name, part.flops, part.likely) for part in parts])
    covered = report.coverage
    if covered is not None:
        print(f"FP8: {covered.share:.1%} of {covered.flops / 1e9:.4g} GFLOP in matrix products")
        _print_shares("module", "in FP8", [(row.module, row.flops, row.fp8) for row in covered.rows])
        for reason in covered.uncounted[:_UNCOUNTED]:
            print(reason)
        if len(covered.uncounted) > _UNCOUNTED:
            rest = f"and {len(covered.uncounted) - _UNCOUNTED} more products are not counted"
            print(rest if report.target else f"{rest}; give the bundle in place of the file: its manifest has the sizes")
    counts = ", ".join(f"{n} {severity}{'s' if n != 1 and severity != 'info' else ''}" for severity, n in report.counts.items())
    rules = f"{report.rules} rules{f' of {report.target}' if report.target else ''}"
    print(f"{report.path}: {counts} ({rules})" if report.rules else f"{report.path}: there are no rules of {report.target} for it")


def _print_shares(kind: str, what: str, rows: Sequence[tuple[str, int, int]]) -> None:
    """Of rows of a name, all its operations and the good ones of them, those with the most that are not, and their part of everything."""
    every = sum(flops for _, flops, _ in rows)
    lacking = sorted((row for row in rows if row[2] < row[1]), key=lambda row: row[2] - row[1])
    table = [(name or "-", f"{flops / 1e9:.4g}", f"{good / flops:.1%}", f"{flops / every:.1%}") for name, flops, good in lacking[:_MODULES]]
    if table:
        print_table((kind, "GFLOP", what, "of all"), table)
    if len(lacking) > _MODULES:
        print(f"and {len(lacking) - _MODULES} more: --format json has them")


def _print_stages(stages: Sequence[StageResult]) -> None:
    for stage in stages:
        print(f"  {stage.name:<12} {stage.verdict:<9} {_evidence(stage)}".rstrip())


def _evidence(stage: StageResult) -> str:
    """The worst figures of a stage, or why there are none."""
    parts = [stage.reason] if stage.reason else []
    outputs = [m for m in stage.metrics if m.case != "samples"]
    if outputs:
        error = max(m.max_relative for m in outputs)
        psnr = min(m.psnr_db for m in outputs)
        parts.append(f"worst error {error:.1e} of the output's range, PSNR {psnr:.1f} dB")
    parts += [f"pictures {m.psnr_db:.1f} dB" for m in stage.metrics if m.case == "samples"]
    return "; ".join(parts)


def print_fields(value: Mapping[str, Any], indent: int = 0) -> None:
    """Nested values as indented lines."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            print(f"{' ' * indent}{key}:")
            print_fields(item, indent + 2)
        elif isinstance(item, list | tuple) and item and isinstance(item[0], Mapping):
            print(f"{' ' * indent}{key}:")
            for element in item:
                print(f"{' ' * indent}  - {', '.join(f'{k}: {v}' for k, v in element.items() if v not in ('', None, [], {}))}")
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list | tuple) else item
            print(f"{' ' * indent}{key}: {text if text not in ('', None, {}) else '-'}")
