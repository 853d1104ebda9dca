"""The commands that take a bundle: `isthmus build | verify | lint | inspect | report | embed | diff | bisect`. See `cli`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from isthmus.differences_text import print_bisect, print_diff
from isthmus.exporter.errors import AccuracyError, UsageError
from isthmus.parameters import Number, common, format_option, quiet
from isthmus.terminal import (
    Progress,
    print_analysed,
    print_built,
    print_embedded,
    print_fields,
    print_findings,
    print_json,
    print_verified,
)

F = TypeVar("F", bound=Callable[..., Any])

_bundle = click.argument("bundle", type=click.Path(path_type=Path))


def _opened(bundle: Path) -> Path:
    """Refuses what is not a bundle, before torch is imported."""
    from isthmus.exporter.bundle import read_manifest

    read_manifest(bundle)
    return bundle


@click.command(short_help="Compile a bundle's engine on this machine.")
@_bundle
@click.option("--force", is_flag=True, help="Build again what is built.")
@click.option("--trust", is_flag=True, help="Use an engine or a plugin library in the bundle that was not made here.")
@format_option()
@common
def build(bundle: Path, force: bool, trust: bool, style: str) -> int:
    """Compiles BUNDLE's engine on the machine that has its device, and checks that it is what was asked for."""
    _opened(bundle)
    quiet()
    from isthmus import pipeline

    try:
        result = pipeline.build(bundle, trust=trust, force=force, progress=Progress())
    except AccuracyError as error:
        if style == "text":
            print_built(error.result)
        raise
    if style == "json":
        print_json(result.summary())
    else:
        print_built(result)
    return result.exit_code


@click.command(short_help="Check a bundle's files, then its accuracy.")
@_bundle
@click.option(
    "--analysis",
    "analyses",
    multiple=True,
    metavar="NAME",
    help="Then analyse what of the model's behaviour survives: a name of `isthmus list analyses`, or all; repeatable.",
)
@click.option("--rows", type=Number(int, 1, 2**20), metavar="N", help="With --analysis: how many rows of inputs are drawn. [default: 256]")
@click.option("--seed", type=Number(int, 0, 2**63 - 1), metavar="N", help="With --analysis: of their drawing. [default: 0]")
@click.option("--model", metavar="MODULE:CALLABLE", help="With --analysis: makes the PyTorch module, for a model that is not registered.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="PATH", help="With --analysis: the weights that the export was given.")
@click.option("--trust", is_flag=True, help="Take engines and libraries that were not made with the bundle; they can run any code.")
@format_option()
@common
def verify(bundle: Path, analyses: tuple[str, ...], trust: bool, style: str, **given: Any) -> int:
    """Checks BUNDLE's integrity (sha256), then its accuracy again. With --analysis, compares figures of the model's behaviour with
    PyTorch's, and puts them into the report; ends with 3 when one is further away than it may be.
    """
    _opened(bundle)
    given = {name: value for name, value in given.items() if value is not None}
    if given and not analyses:
        raise UsageError(f"--{next(iter(given))} is for --analysis", hint="isthmus verify BUNDLE --analysis all")
    if analyses:
        from isthmus.calibration.analysis import ANALYSES

        for name in analyses:
            if name != "all":
                ANALYSES.entry(name)
    quiet()
    from isthmus import pipeline

    try:
        result = pipeline.verify(bundle, trust=trust, progress=Progress())
    except AccuracyError as error:
        if style == "text":
            print_verified(error.result)
        raise
    if style == "text":
        print_verified(result)
    if not analyses:
        if style == "json":
            print_json(result.summary())
        return result.exit_code
    found = pipeline.analyse(bundle, analyses, trust=trust, progress=Progress(), **given)
    if style == "json":
        print_json({**result.summary(), "analyses": found.summary(), "exit_code": max(result.exit_code, found.exit_code)})
    else:
        print_analysed(found)
    return max(result.exit_code, found.exit_code)


@click.command(short_help="Check a graph against its target's rules.")
@click.argument("path", metavar="BUNDLE|FILE.onnx|NAME.mlpackage", type=click.Path(path_type=Path))
@click.option("--target", metavar="NAME", help="Whose rules. [default: the bundle's target; for a file, every rule]")
@click.option("--chip", metavar="NAME", default="", help="Core ML: the chip that is asked about, such as A16 or M2. [default: every one]")
@click.option("--observe", is_flag=True, help="Core ML: run the bundle's example inputs in the interpreter, for rules on large values.")
@format_option()
@common
def lint(path: Path, target: str | None, chip: str, observe: bool, style: str) -> int:
    """Finds what a target's compiler would refuse, compute in another precision, or waste. Ends with 1 when there are errors."""
    from isthmus.exporter.target import TARGETS
    from isthmus.targets.coreml.rules.chips import check_chip

    if target is not None:
        TARGETS.entry(target)
    check_chip(chip)
    if path.is_dir() and path.suffix != ".mlpackage":
        _opened(path)
    elif not path.exists():
        raise UsageError(f"{path} does not exist", hint="give a bundle's folder, an ONNX file or a Core ML package")
    quiet()
    from isthmus.findings import examine

    report = examine(path, target, chip=chip, observe=observe)
    if style == "json":
        print_json(report.value())
    else:
        print_findings(report)
    return report.exit_code


@click.command(short_help="Show what a bundle is.")
@_bundle
@format_option()
@common
def inspect(bundle: Path, style: str) -> None:
    """Shows what BUNDLE is: model, target, inputs, outputs, operators, weights, verdicts."""
    _opened(bundle)
    quiet()
    from isthmus import pipeline

    value = pipeline.inspect(bundle)
    if style == "json":
        print_json(value)
    else:
        print_fields(value)


@click.command(short_help="Rebuild a bundle's report, or compare two.")
@_bundle
@click.argument("other", required=False, type=click.Path(path_type=Path))
@click.option("--modules", is_flag=True,
              help="First compare every stage with PyTorch, module by module, and put that into the bundle and its report.")  # fmt: skip
@click.option("--model", metavar="MODULE:CALLABLE", help="With --modules: makes the PyTorch module, for a model that is not registered.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="PATH", help="With --modules: the weights that the export was given.")
@click.option("--trust", is_flag=True, help="With --modules: take engines and libraries that were not made with the bundle.")
@click.option("--tune", type=click.Path(path_type=Path), metavar="FILE",
              help="Put a search into the bundle's report: the NAME.pareto.json that `isthmus tune` wrote beside its recipe.")  # fmt: skip
@click.option("--compare", is_flag=True, help="Put the reports of BUNDLE and OTHER side by side, and look for regressions of OTHER.")
@click.option("--threshold", type=Number(float, 0.0, sys.float_info.max), metavar="DB",
              help="With --compare: how much lower a SQNR or PSNR of OTHER may be. [default: 1 dB]")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="With --compare: the page. [default: compare.html]")
@format_option()
@common
def report(
    bundle: Path,
    other: Path | None,
    compare: bool,
    threshold: float | None,
    output: Path | None,
    modules: bool,
    tune: Path | None,
    style: str,
    **given: Any,
) -> int:
    """Rebuilds BUNDLE's accuracy report if need be, and prints where it is. With --compare, puts the reports of two bundles of one model
    side by side, and ends with 3 when a figure of OTHER is lower than BUNDLE's by more than the threshold, or a verdict weaker.
    """
    if compare != (other is not None):
        raise UsageError(
            "--compare takes two bundles, the second of which is judged" if compare else f"got a second bundle, {other}, without --compare",
            hint="isthmus report A B --compare",
        )
    for value, option in ((threshold, "--threshold"), (output, "-o")):
        if value is not None and not compare:
            raise UsageError(f"{option} is for --compare", hint="isthmus report A B --compare")
    for used, option in ((modules, "--modules"), (tune, "--tune")):
        if compare and used:
            raise UsageError(f"--compare reads two reports, and {option} makes one", hint="make each bundle's report first")
    for name, value in given.items():
        if value and not modules:
            raise UsageError(f"--{name} is for --modules", hint="isthmus report BUNDLE --modules")
    for side in (bundle, other):
        if side is not None:
            _opened(side)
    quiet()
    from isthmus import pipeline
    from isthmus.calibration.compare import DEFAULT_THRESHOLD

    if other is not None:
        page = output or Path("compare.html")
        found = pipeline.compare_reports(bundle, other, threshold=DEFAULT_THRESHOLD if threshold is None else threshold, output=page)
        if style == "json":
            print_json({**found.summary(), "page": str(page)})
        else:
            from isthmus.comparison_text import print_comparison

            print_comparison(found)
            print(f"page: {page}")
        return found.exit_code
    path = pipeline.report(bundle, modules=modules, tune=tune, progress=Progress(), **given)
    if style == "json":
        print_json({"report": str(path)})
    else:
        print(path)
    return 0


@click.command(short_help="Write a program that runs a bundle.")
@_bundle
@click.option("--language", required=True, metavar="NAME", help="The program's language: swift, a package for a bundle of coreml.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The program's folder.")
@click.option("--force", is_flag=True, help="Replace a program that exists.")
@format_option()
@common
def embed(bundle: Path, language: str, output: Path, force: bool, style: str) -> None:
    """Writes a program that runs BUNDLE on its device, with tests that compare it with PyTorch. It is not compiled here."""
    from isthmus import embedding

    embedding.check_embedding(bundle, language, output, force=force)
    quiet()
    result = embedding.embed(bundle, language, output, force=force, progress=Progress())
    if style == "json":
        print_json(result.summary())
    else:
        print_embedded(result)


def _comparing(function: Any) -> Any:
    """The options of `diff` and `bisect`."""
    for option in reversed((
        click.option("--model", metavar="MODULE:CALLABLE", help="Makes the PyTorch module, for a model that is not registered."),
        click.option("--weights", type=click.Path(path_type=Path), metavar="PATH", help="The weights that the export was given."),
        click.option("--threshold", type=Number(float, 0.0, sys.float_info.max), metavar="X",
                     help="Relative error above which a module has gone wrong. [default: the precision's]"),
        click.option("--memory", type=Number(int, 1, 2**24), default=1024, show_default=True, metavar="MIB",
                     help="MiB of values that are held at a time, beside the weights."),
        click.option("--case", "cases", multiple=True, metavar="NAME", help="A case of the bundle's reference; repeatable. [default: all]"),
        click.option("--trust", is_flag=True, help="Take engines and libraries that were not made with the bundle; they can run any code."),
    )):  # fmt: skip
        function = option(function)
    return function


@click.command(short_help="Compare a bundle module by module.")
@click.argument("a")
@click.argument("b")
@_comparing
@format_option()
@common
def diff(a: str, b: str, memory: int, style: str, **given: Any) -> int:
    """Compares B's artifact with A's, or with PyTorch where A is the word torch, module by module. Ends with 3 when a module of B is over
    the threshold, with 5 when this machine cannot run its artifact.
    """
    for side in (a, b):
        if side != "torch":
            _opened(Path(side))
    quiet()
    from isthmus import pipeline

    result = pipeline.diff(a, b, memory=memory * 2**20, progress=Progress(), **given)
    if style == "json":
        print_json(result.summary())
    else:
        print_diff(result)
    return result.exit_code


@click.command(short_help="Name the module that first went wrong.")
@_bundle
@_comparing
@format_option()
@common
def bisect(bundle: Path, memory: int, style: str, **given: Any) -> int:
    """Says which module of BUNDLE's model first went wrong, and in which stage. Ends with 3 when one did, with 5 when this machine can run
    no stage.
    """
    _opened(bundle)
    quiet()
    from isthmus import pipeline

    result = pipeline.bisect(bundle, memory=memory * 2**20, progress=Progress(), **given)
    if style == "json":
        print_json(result.summary())
    else:
        print_bisect(result)
    return result.exit_code


COMMANDS: tuple[click.Command, ...] = (build, verify, lint, inspect, report, embed, diff, bisect)
