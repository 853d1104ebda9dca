"""The command line: `isthmus list | doctor | export | calibrate | tune | build | verify | lint | inspect | report | embed | diff | bisect`.

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
from isthmus.bundle_commands import COMMANDS
from isthmus.exporter.errors import AccuracyError, IsthmusError
from isthmus.parameters import CONFIG_SETTINGS, PROBLEMS, ExportCommand, Number, Option, common, format_option, quiet, read_config
from isthmus.process import Commands
from isthmus.terminal import (
    Progress,
    print_calibrated,
    print_export,
    print_json,
    print_operators,
    print_table,
    print_tuned,
    tell_trials,
)

if TYPE_CHECKING:
    from isthmus.exporter.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])

_KINDS = ("models", "targets", "ops", "calibrators", "analyses")


# isthmus, list, doctor


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="isthmus")
@common
def main() -> None:
    """Carries PyTorch image-generation models to the hardware that serves them, and measures every artifact against PyTorch."""


def _registries() -> dict[str, Registry[Any]]:
    from isthmus.calibration.analysis import ANALYSES
    from isthmus.calibration.calibrator import CALIBRATORS
    from isthmus.exporter.op import OPS
    from isthmus.exporter.spec import MODELS
    from isthmus.exporter.target import TARGETS

    return {"models": MODELS, "targets": TARGETS, "ops": OPS, "calibrators": CALIBRATORS, "analyses": ANALYSES}


@main.command("list", short_help="List models, targets, ops and more.")
@click.argument("kind", type=click.Choice(_KINDS), required=False)
@format_option(("table", "json"))
@common
def list_command(kind: str | None, style: str) -> None:
    """Lists what exists: models, targets, operators, calibrators and analyses."""
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


def _weight_scales(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Refuses a method that is not registered, or does not choose for weights."""
    from isthmus.calibration.calibrator import channel_calibrators

    if value is not None and value not in (known := channel_calibrators()):
        raise click.BadParameter(f"got {value!r}, expected one of {', '.join(sorted(known))}")
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
    help="A .safetensors file, a folder in the diffusers layout, or, for a model that is published so, a .pth of tensors alone.",
)
@click.option("--inputs", cls=Option, metavar="MODULE:CALLABLE", help="Returns the example inputs of a module:callable MODEL.")
@click.option("--dynamic", cls=Option, multiple=True, metavar="NAME:AXIS=MIN,OPT,MAX", help="Makes an input's axis dynamic; repeatable.")
@_calibration_options
@click.option("--calibration-table", cls=Option, metavar="FILE", type=click.Path(path_type=Path),
              help="The ranges, in place of data: what `isthmus calibrate` wrote, or calibration.json of another bundle.")  # fmt: skip
@click.option("--weight-rounding", cls=Option, type=click.Choice(["nearest", "gptq"]),
              help="How weights are quantised; gptq lets errors make up for each other. [default: nearest]")  # fmt: skip
@click.option("--weight-scales", cls=Option, metavar="M", callback=_weight_scales,
              help="What the scale of each channel of a matrix, or block in int4, represents: all of it (max), or what makes the mean "
              "squared error least (mse). [default: max]")  # fmt: skip
@click.option("--smooth", cls=Option, type=Number(float, 0.0, 1.0), metavar="ALPHA",
              help="Moves so much of outlier channels' range from quantised activations into weights (SmoothQuant); 0.5 is usual. "
              "[default: not at all]")  # fmt: skip
@click.option("--recipe", cls=Option, metavar="FILE", type=click.Path(path_type=Path),
              help="What `isthmus tune` wrote: the precision, the modules that compute in it, and how ranges are found.")  # fmt: skip
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
    from isthmus.calibration.recipe import with_recipe
    from isthmus.exporter.call import checked

    problems: list[IsthmusError] = ctx.meta.get(PROBLEMS, [])
    given = with_recipe(given, problems)
    arguments = checked(given, config_settings=ctx.meta.get(CONFIG_SETTINGS, {}), problems=problems)
    if given["recipe"] is not None:
        arguments["recipe"] = given["recipe"]
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
@click.option("--weights", cls=Option, metavar="PATH", type=click.Path(path_type=Path), help="See `isthmus export --help`.")
@click.option("--inputs", cls=Option, metavar="MODULE:CALLABLE", help="Returns the example inputs of a module:callable MODEL.")
@click.option("--dynamic", cls=Option, multiple=True, metavar="NAME:AXIS=MIN,OPT,MAX", help="Makes an input's axis dynamic; repeatable.")
@_calibration_options
@click.option("--seed", cls=Option, type=Number(int, 0, 2**63 - 1), default=0, show_default=True, help="Seed of what is drawn.")
@click.option("--force", cls=Option, is_flag=True, help="Replace a file that exists.")
@format_option()
@common
@click.pass_context
def calibrate(ctx: click.Context, /, style: str, **given: Any) -> None:
    """Observes what MODEL's matrix products read and compute on calibration data, and writes the ranges as a table, for every precision."""
    from isthmus.exporter.call import checked_calibration

    arguments = checked_calibration(given, problems=ctx.meta.get(PROBLEMS, []))
    quiet()
    from isthmus import pipeline

    result = pipeline.calibrate(**arguments, progress=Progress())
    if style == "json":
        print_json(result.summary())
    else:
        print_calibrated(result)


# tune


@main.command(
    short_help="Find what can compute in FP8 or INT8.",
    epilog="MODEL is a name of `isthmus list models`, or module:callable, which returns an nn.Module.",
)
@click.argument("model", required=False)
@click.option("--precision", cls=Option, type=click.Choice(["fp8", "int8"]), help="The low precision.")
@click.option("--min-sqnr", cls=Option, type=_bound, metavar="DB", help="The least SQNR of the output, against float32, in dB.")
@click.option("--min-psnr", cls=Option, type=_bound, metavar="DB", help="The least PSNR of the pictures that the sampler draws, in dB.")
@click.option("--max-lpips", cls=Option, type=_bound, metavar="X",
              help="Their largest mean LPIPS-style distance (EfficientNet-Lite0 features, no learned heads).")  # fmt: skip
@click.option("-o", "--output", cls=Option, type=click.Path(path_type=Path), metavar="FILE", help="The recipe, such as recipe.yaml.")
@click.option("--target", cls=Option, metavar="NAME", help="Whose layers. [default: tensorrt for fp8, onnxruntime for int8]")
@click.option("--opset", cls=Option, type=Number(int, 1, 1000), metavar="N", help="ONNX opset of the graph. [default: the target's]")
@click.option("--batch-size", cls=Option, type=Number(int, 1, 2**20), metavar="N", help="Batch size of the example inputs.")
@click.option("--set", "settings", cls=Option, multiple=True, metavar="KEY=VALUE", help="Changes a setting of the model; repeatable.")
@click.option("--weights", cls=Option, metavar="PATH", type=click.Path(path_type=Path), help="See `isthmus export --help`.")
@click.option("--inputs", cls=Option, metavar="MODULE:CALLABLE", help="Returns the example inputs of a module:callable MODEL.")
@click.option("--dynamic", cls=Option, multiple=True, metavar="NAME:AXIS=MIN,OPT,MAX", help="Makes an input's axis dynamic; repeatable.")
@_calibration_options
@click.option("--weight-rounding", cls=Option, type=click.Choice(["nearest", "gptq"]), help="[default: both are tried]")
@click.option("--smooth", cls=Option, type=Number(float, 0.0, 1.0), metavar="ALPHA", help="As of `export`. [default: not at all]")
@click.option("--held-out", cls=Option, type=Number(int, 1, 2**16), metavar="N",
              help="Sets of inputs that are measured on. [default: 8; of those that are given, every fourth]")  # fmt: skip
@click.option("--jobs", cls=Option, type=Number(int, 1, 1024), metavar="N", default=1, show_default=True, help="Processes that run trials.")
@click.option("--executor", "executor_name", cls=Option, type=click.Choice(["local", "ray"]), default="local", show_default=True,
              help="Where trials run: on this machine, or on a Ray cluster.")  # fmt: skip
@click.option("--address", cls=Option, metavar="ADDRESS", help="Of the Ray cluster, such as auto or ray://host:10001.")
@click.option("--seed", cls=Option, type=Number(int, 0, 2**63 - 1), default=0, show_default=True, help="Seed of what is drawn.")
@click.option("--force", cls=Option, is_flag=True, help="Replace a recipe that exists.")
@format_option()
@common
@click.pass_context
def tune(ctx: click.Context, /, style: str, **given: Any) -> None:
    """Searches for the modules of MODEL that can compute in a low precision under a budget of accuracy, and writes a recipe for
    `isthmus export --recipe`. A call that was killed goes on where it was.
    """
    from isthmus.exporter.call import checked_tuning

    arguments = checked_tuning(given, problems=ctx.meta.get(PROBLEMS, []))
    quiet()
    from isthmus import pipeline

    result = pipeline.tune(**arguments, progress=Progress(), tell=tell_trials)
    if style == "json":
        print_json(result.summary())
    else:
        print_tuned(result)


for _command in COMMANDS:
    main.add_command(_command)


if __name__ == "__main__":
    main()
