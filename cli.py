"""The command line: `isthmus list | doctor | export | build | verify | lint | inspect | report`.

Everything that can be wrong with a call is checked here, before torch, onnx or a vendor SDK is imported, and all of it is reported at
once. Results go to stdout, progress and errors to stderr; with `--format json` stdout gets one JSON object and nothing else.

Exit codes: 0 ok, 1 failure, 2 usage, 3 the artifact was written but its accuracy check failed, 4 the target does not support the model,
5 this machine lacks the hardware or toolchain; 130, 141 and 143 after Ctrl-C, a closed pipe and SIGTERM, as of any program.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isthmus import __version__
from isthmus.exporter.errors import AccuracyError, IsthmusError, UsageError
from isthmus.parameters import CONFIG_SETTINGS, PROBLEMS, ExportCommand, Number, Option, common, format_option, quiet, read_config
from isthmus.process import Commands
from isthmus.terminal import (
    Progress,
    print_built,
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

_KINDS = ("models", "targets", "ops", "calibrators")


# isthmus, list, doctor


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="isthmus")
@common
def main() -> None:
    """Carries PyTorch image-generation models to the hardware that serves them, and measures every artifact against PyTorch."""


def _registries() -> dict[str, Registry[Any] | None]:
    from isthmus.exporter.op import OPS
    from isthmus.exporter.spec import MODELS
    from isthmus.exporter.target import TARGETS

    return {"models": MODELS, "targets": TARGETS, "ops": OPS, "calibrators": None}


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
        entries = sorted(registry.index.values(), key=lambda e: e.name) if registry is not None else []
        if entries:
            print_table((name, "summary"), [(e.name, e.summary) for e in entries])
        else:
            print(f"{name}: none registered yet")
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


def _entries(registry: Registry[Any] | None) -> list[dict[str, Any]]:
    if registry is None:
        return []
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
@click.option("--calibration-data", cls=Option, metavar="FILE|DIR|random",
              help="Inputs that set the ranges of a quantised export, as .npz; `random` for inputs that mean nothing. "
              "[default: the model's own samples]")  # fmt: skip
@click.option("--calibration-size", cls=Option, type=Number(int, 1, 2**20), metavar="N", help="Number of sets of calibration inputs.")
@click.option("--calibration-method", cls=Option, metavar="M", help="How a range follows from what was seen.")
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


# build, verify, lint, inspect, report

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
@click.argument("path", metavar="BUNDLE|FILE.onnx", type=click.Path(path_type=Path))
@click.option("--target", metavar="NAME", help="Whose rules. [default: the bundle's target; for a file, every rule]")
@format_option()
@common
def lint(path: Path, target: str | None, style: str) -> int:
    """Finds what a target's compiler would refuse, compute in another precision, or waste. Ends with 1 when there are errors."""
    from isthmus.exporter.target import TARGETS

    if target is not None:
        TARGETS.entry(target)
    if path.is_dir():
        _opened(path)
    elif not path.is_file():
        raise UsageError(f"{path} does not exist", hint="give a bundle's folder or an ONNX file")
    quiet()
    from isthmus.findings import examine

    report = examine(path, target)
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


@main.command(short_help="Rebuild a bundle's report, print its path.")
@_bundle
@format_option()
@common
def report(bundle: Path, style: str) -> None:
    """Rebuilds BUNDLE's accuracy report if need be, and prints where it is."""
    _opened(bundle)
    quiet()
    from isthmus import pipeline

    path = pipeline.report(bundle)
    if style == "json":
        print_json({"report": str(path)})
    else:
        print(path)


if __name__ == "__main__":
    main()
