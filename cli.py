"""The command line: `isthmus list | doctor | export | calibrate | build | verify | lint | inspect | report | embed | diff | bisect`.

Everything that can be wrong with a call is checked here, before torch, onnx or a vendor SDK is imported, and all of it is reported at
once. Results go to stdout, progress and errors to stderr; with `--format json` stdout gets one JSON object and nothing else.

Exit codes: 0 ok, 1 failure, 2 usage, 3 the artifact was written but its accuracy check failed, 4 the target does not support the model,
5 this machine lacks the hardware or toolchain; 130, 141 and 143 after Ctrl-C, a closed pipe and SIGTERM, as of any program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from isthmus import __version__
from isthmus.comparison_text import print_comparison
from isthmus.differences_text import print_bisect, print_diff
from isthmus.exporter.errors import AccuracyError, IsthmusError, UsageError
from isthmus.parameters import CONFIG_SETTINGS, PROBLEMS, ExportCommand, Number, Option, common, format_option, quiet, read_config
from isthmus.process import Commands
from isthmus.terminal import (
    Progress,
    print_built,
    print_calibrated,
    print_embedded,
    print_export,
    print_fields,
    print_findings,
    print_json,
    print_operators,
    print_table,
    print_verified,
)

if TYPE_CHECKING:
    from isthmus.exporter.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])

_KINDS = ("models", "targets", "ops", "calibrators")


# isthmus, list, doctor


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="isthmus")
@common
def main() -> None:
    """Carries PyTorch image-generation models to the hardware that serves them, and measures every artifact against PyTorch."""


def _registries() -> dict[str, Registry[Any]]:
    from isthmus.calibration.calibrator import CALIBRATORS
    from isthmus.exporter.op import OPS
    from isthmus.exporter.spec import MODELS
    from isthmus.exporter.target import TARGETS

    return {"models": MODELS, "targets": TARGETS, "ops": OPS, "calibrators": CALIBRATORS}


@main.command("list", short_help="List models, targets, ops and calibrators.")
@click.argument("kind", type=click.Choice(_KINDS), required=False)
@format_option(("table", "json"))
@common
def list_command(kind: str | None, style: str) -> None:
    """Lists what exists: models, targets, operators and calibrators."""
    registries = {name: registry for name, registry in _registries().items() if kind in (None, name)}
    if style == "json":
        print_json({name: _operators() if name == "ops" else _entries(registry) for name, registry in registries.items()})
        return
    for name, registry in registries.items():
        print_table((name, "summary"), [(e.name, e.summary) for e in sorted(registry.index.values(), key=lambda e: e.name)])
        if kind == "ops":
            print()
            print_operators(_operators())
        if kind is None and name != _KINDS[-1]:
            print()


def _operators() -> list[dict[str, Any]]:
    """Every operator with the state of every part on this machine."""
    from isthmus.exporter.op import DOMAIN, OPS
    from isthmus.exporter.ops.state import part_states

    return [
        {
            "name": name,
            "summary": OPS[name].summary,
            "module": OPS.entry(name).module,
            "nodes": [f"{DOMAIN}::{form.op_type}" for form in OPS[name].forms],
            "parts": {part: asdict(state) for part, state in part_states(OPS[name]).items()},
        }
        for name in sorted(OPS)
    ]


def _entries(registry: Registry[Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": entry.name,
            "summary": entry.summary,
            "module": entry.module,
            "options": {o.name: {"type": o.annotation, "default": o.default} for o in entry.options.values()},
        }
        for entry in sorted(registry.index.values(), key=lambda e: e.name)
    ]


@main.command(short_help="What this machine can lower, build, verify.")
@format_option()
@common
def doctor(style: str) -> int:
    """Shows what this machine can lower, build and verify, and what to install for the rest."""
    quiet()
    from isthmus.exporter.machine import examine
    from isthmus.exporter.target import TARGETS

    report = examine([TARGETS[name] for name in TARGETS])
    code = 0 if report.can_lower else 5
    if style == "json":
        print_json({**report.value(), "exit_code": code})
        return code
    for name, text in report.facts.items():
        print(f"{name:<12} {text}")
    for target, capabilities in report.targets.items():
        print(f"\n{target}")
        for c in capabilities:
            print(f"  {c.name:<14} {'yes' if c.available else 'no ':<4} {c.detail}")
            if not c.available and c.fix:
                print(f"                fix: {c.fix}")
    if code:
        print("error: no target can lower a model on this machine", file=sys.stderr)
    return code


# export


_bound = Number(float, 0.0, sys.float_info.max)


def _calibration_method(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Refuses a method that is not registered."""
    from isthmus.calibration.calibrator import CALIBRATORS

    if value is not None and value not in CALIBRATORS:
        raise click.BadParameter(f"got {value!r}, expected one of {', '.join(sorted(CALIBRATORS))}")
    return value


def _calibration_options(command: F) -> F:
    """Adds the options that say on which data ranges are observed, and how they follow from it."""
    for option in reversed(
        (
            click.option("--calibration-data", cls=Option, metavar="FILE|DIR|MODULE:CALLABLE|random",
                         help="Inputs that set the ranges of a quantised export: .npz, .safetensors, a folder of them or of pictures, or "
                         "what a callable gives; `random` for inputs that mean nothing. [default: the model's own samples]"),
            click.option("--calibration-size", cls=Option, type=Number(int, 1, 2**20), metavar="N",
                         help="Number of sets of calibration inputs."),
            click.option("--calibration-method", cls=Option, metavar="M", callback=_calibration_method,
                         help="How a range follows from what was seen: a name of `isthmus list calibrators`. [default: max]"),
            click.option("--calibration-preprocess", cls=Option, metavar="KEY=VALUE,…",
                         help="What becomes of pictures, such as input=x,resize=256,crop=256,mean=0.5,std=0.5,layout=chw."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@main.command(
    cls=ExportCommand,
    short_help="Export a model, measured against PyTorch.",
    epilog="MODEL is a name of `isthmus list models`, or module:callable, which returns an nn.Module.",
)
@click.argument("model", required=False)
@click.option("--config", cls=Option, type=click.Path(path_type=Path), is_eager=True, callback=read_config, expose_value=False,
              help="YAML file whose keys are these options' names; the command line wins.")  # fmt: skip
@click.option("--target", cls=Option, metavar="NAME", help="What to export to: a name of `isthmus list targets`.")
@click.option("-o", "--output", cls=Option, type=click.Path(path_type=Path), help="The bundle's folder. [default: MODEL-TARGET-PRECISION]")
@click.option("--precision", cls=Option, metavar="P", help="Such as fp32 or fp16. [default: the target's first]")
@click.option("--opset", cls=Option, type=Number(int, 1, 1000), metavar="N", help="ONNX opset. [default: the target's]")
@click.option("--batch-size", cls=Option, type=Number(int, 1, 2**20), metavar="N", help="Batch size of the example inputs.")
@click.option("--set", "settings", cls=Option, multiple=True, metavar="KEY=VALUE", help="Changes a setting of the model; repeatable.")
@click.option(
    "--weights",
    cls=Option,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="A .safetensors file, or a folder in the diffusers layout.",
)
@click.option("--inputs", cls=Option, metavar="MODULE:CALLABLE", help="Returns the example inputs of a module:callable MODEL.")
@click.option("--dynamic", cls=Option, multiple=True, metavar="NAME:AXIS=MIN,OPT,MAX", help="Makes an input's axis dynamic; repeatable.")
@_calibration_options
@click.option("--weight-rounding", cls=Option, type=click.Choice(["nearest", "gptq"]),
              help="How weights are quantised; gptq lets errors make up for each other. [default: nearest]")  # fmt: skip
@click.option("--smooth", cls=Option, type=Number(float, 0.0, 1.0), metavar="ALPHA",
              help="Moves so much of outlier channels' range from quantised activations into weights (SmoothQuant); 0.5 is usual. "
              "[default: not at all]")  # fmt: skip
@click.option("--sampler", cls=Option, type=click.Choice(["step", "loop"]),
              help="loop: one more graph, with the model's sampler as a loop of fixed steps in it. [default: step]")  # fmt: skip
@click.option("--atol", cls=Option, type=_bound, help="Bound on |error| - rtol * |reference|, elementwise.")
@click.option("--rtol", cls=Option, type=_bound, help="See --atol.")
@click.option("--min-psnr", cls=Option, type=_bound, metavar="DB", help="Bound on the PSNR, in dB.")
@click.option("--seed", cls=Option, type=Number(int, 0, 2**63 - 1), default=0, show_default=True,
              help="Seed of random inputs and weights.")  # fmt: skip
@click.option("--force", cls=Option, is_flag=True, help="Replace a bundle that exists.")
@click.option("--dry-run", cls=Option, is_flag=True, help="Check the call and print the plan, write nothing.")
@format_option()
@common
@click.pass_context
def export(ctx: click.Context, /, style: str, **given: Any) -> int:
    """Exports MODEL to a target, measures it against PyTorch, and writes a bundle."""
    from isthmus.exporter.call import checked

    problems: list[IsthmusError] = ctx.meta.get(PROBLEMS, [])
    arguments = checked(given, config_settings=ctx.meta.get(CONFIG_SETTINGS, {}), problems=problems)
    quiet()
    from isthmus import pipeline

    try:
        result = pipeline.export(**arguments, progress=Progress())
    except AccuracyError as error:
        if style == "text":
            print_export(error.result)
        raise
    if style == "json":
        print_json(result.summary())
    else:
        print_export(result)
    return result.exit_code


# calibrate


@main.command(
    short_help="Observe a model's ranges, write them as a table.",
    epilog="MODEL is a name of `isthmus list models`, or module:callable, which returns an nn.Module.",
)
@click.argument("model", required=False)
@click.option("-o", "--output", cls=Option, type=click.Path(path_type=Path), metavar="FILE", help="The table, such as calibration.json.")
@click.option("--opset", cls=Option, type=Number(int, 1, 1000), metavar="N", help="ONNX opset of the graph whose values are named.")
@click.option("--batch-size", cls=Option, type=Number(int, 1, 2**20), metavar="N", help="Batch size of the example inputs.")
@click.option("--set", "settings", cls=Option, multiple=True, metavar="KEY=VALUE", help="Changes a setting of the model; repeatable.")
@click.option("--weights", cls=Option, metavar="PATH", type=click.Path(path_type=Path), help="A .safetensors file or a diffusers folder.")
@click.option("--inputs", cls=Option, metavar="MODULE:CALLABLE", help="Returns the example inputs of a module:callable MODEL.")
@click.option("--dynamic", cls=Option, multiple=True, metavar="NAME:AXIS=MIN,OPT,MAX", help="Makes an input's axis dynamic; repeatable.")
@_calibration_options
@click.option("--seed", cls=Option, type=Number(int, 0, 2**63 - 1), default=0, show_default=True, help="Seed of what is drawn.")
@click.option("--force", cls=Option, is_flag=True, help="Replace a file that exists.")
@format_option()
@common
@click.pass_context
def calibrate(ctx: click.Context, /, style: str, **given: Any) -> None:
    """Observes what MODEL's matrix products read on calibration data, and writes the ranges as a table, for every precision."""
    from isthmus.exporter.call import checked_calibration

    arguments = checked_calibration(given, problems=ctx.meta.get(PROBLEMS, []))
    quiet()
    from isthmus import pipeline

    result = pipeline.calibrate(**arguments, progress=Progress())
    if style == "json":
        print_json(result.summary())
    else:
        print_calibrated(result)


# build, verify, lint, inspect, report, embed, diff, bisect

_bundle = click.argument("bundle", type=click.Path(path_type=Path))


def _opened(bundle: Path) -> Path:
    """Refuses what is not a bundle, before torch is imported."""
    from isthmus.exporter.bundle import read_manifest

    read_manifest(bundle)
    return bundle


@main.command(short_help="Compile a bundle's engine on this machine.")
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


@main.command(short_help="Check a bundle's files, then its accuracy.")
@_bundle
@click.option("--trust", is_flag=True, help="Take engines and libraries that were not made with the bundle; they can run any code.")
@format_option()
@common
def verify(bundle: Path, trust: bool, style: str) -> int:
    """Checks BUNDLE's integrity (sha256), then its accuracy again."""
    _opened(bundle)
    quiet()
    from isthmus import pipeline

    try:
        result = pipeline.verify(bundle, trust=trust, progress=Progress())
    except AccuracyError as error:
        if style == "text":
            print_verified(error.result)
        raise
    if style == "json":
        print_json(result.summary())
    else:
        print_verified(result)
    return result.exit_code


@main.command(short_help="Check a graph against its target's rules.")
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


@main.command(short_help="Show what a bundle is.")
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


@main.command(short_help="Rebuild a bundle's report, or compare two.")
@_bundle
@click.argument("other", required=False, type=click.Path(path_type=Path))
@click.option("--modules", is_flag=True,
              help="First compare every stage with PyTorch, module by module, and put what was found into the bundle and its report.")  # fmt: skip
@click.option("--model", metavar="MODULE:CALLABLE", help="With --modules: makes the PyTorch module, for a model that is not registered.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="PATH", help="With --modules: the weights that the export was given.")
@click.option("--trust", is_flag=True, help="With --modules: take engines and libraries that were not made with the bundle.")
@click.option("--compare", is_flag=True, help="Put the reports of BUNDLE and OTHER side by side, and look for regressions of OTHER.")
@click.option("--threshold", type=Number(float, 0.0, sys.float_info.max), metavar="DB",
              help="With --compare: how much lower a SQNR or PSNR of OTHER may be. [default: 1 dB]")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="With --compare: the page. [default: compare.html]")
@format_option()
@common
def report(
    bundle: Path, other: Path | None, compare: bool, threshold: float | None, output: Path | None, modules: bool, style: str, **given: Any
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
    if compare and modules:
        raise UsageError("--compare reads two reports, and --modules makes one", hint="isthmus report BUNDLE --modules, for each of them")
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
            print_comparison(found)
            print(f"page: {page}")
        return found.exit_code
    path = pipeline.report(bundle, modules=modules, progress=Progress(), **given)
    if style == "json":
        print_json({"report": str(path)})
    else:
        print(path)
    return 0


@main.command(short_help="Write a program that runs a bundle.")
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


@main.command(short_help="Compare a bundle module by module.")
@click.argument("a")
@click.argument("b")
@_comparing
@format_option()
@common
def diff(a: str, b: str, memory: int, style: str, **given: Any) -> int:
    """Compares B's artifact with A's, or with PyTorch where A is the word torch, module by module. Ends with 3 when a module of B is over
    the threshold.
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


@main.command(short_help="Name the module that first went wrong.")
@_bundle
@_comparing
@format_option()
@common
def bisect(bundle: Path, memory: int, style: str, **given: Any) -> int:
    """Says which module of BUNDLE's model first went wrong, and in which stage. Ends with 3 when one did."""
    _opened(bundle)
    quiet()
    from isthmus import pipeline

    result = pipeline.bisect(bundle, memory=memory * 2**20, progress=Progress(), **given)
    if style == "json":
        print_json(result.summary())
    else:
        print_bisect(result)
    return result.exit_code


if __name__ == "__main__":
    main()
