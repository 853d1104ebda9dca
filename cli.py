"""The command line: `isthmus list | doctor | export | verify | inspect | report`.

Everything that can be wrong with a call is checked here, before torch, onnx or a vendor SDK is imported, and all of it is reported at
once. Results go to stdout, progress and errors to stderr; with `--format json` stdout gets one JSON object and nothing else.

Exit codes: 0 ok, 1 failure, 2 usage, 3 the artifact was written but its accuracy check failed, 4 the target does not support the model,
5 this machine lacks the hardware or toolchain; 130, 141 and 143 after Ctrl-C, a closed pipe and SIGTERM, as of any program.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import math
import os
import signal
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from isthmus import __version__
from isthmus.exporter.errors import AccuracyError, IsthmusError, UnknownNameError, UsageError
from isthmus.terminal import Progress, print_export, print_fields, print_json, print_operators, print_table, print_verified

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from isthmus.exporter.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])

_PROBLEMS = "isthmus.problems"
_CONFIG_SETTINGS = "isthmus.config_settings"
_MAX_CONFIG = 2**20
_KINDS = ("models", "targets", "ops", "calibrators")


# Errors, and what the process ends with


class _Commands(click.Group):
    """The group of commands. Turns every exception into one message and an exit code."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args)
        extra.pop("standalone_mode", None)
        if hasattr(signal, "SIGTERM"):
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, _terminated)
        try:
            # Not click's own main, which ends with 1 when the reader of stdout goes away.
            with self.make_context(prog_name or "isthmus", arguments, **extra) as ctx:
                code = self.invoke(ctx)
            sys.stdout.flush()
        except click.exceptions.Exit as stop:
            code = stop.exit_code
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = _fail(error, as_json=_wants_json(arguments))
        if code == 130 and args is None:
            # Python ends with SIGINT itself, not with 130, when a KeyboardInterrupt has passed through exec() of a text, as torch and
            # dataclasses use it, although it was handled. Registered first of all at import, this runs after every other exit function.
            _interrupted.append(code)
        sys.exit(code if isinstance(code, int) else 0)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UnknownNameError("command", args[0], list(self.commands))
        return super().resolve_command(ctx, args)


_interrupted: list[int] = []


@atexit.register
def _end_interrupted() -> None:
    if _interrupted:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_interrupted[0])


def _terminated(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _wants_json(arguments: Sequence[str]) -> bool:
    return "--format=json" in arguments or any(pair == ("--format", "json") for pair in itertools.pairwise(arguments))


def _fail(error: BaseException, *, as_json: bool) -> int:
    """Reports an exception, and gives the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader went away: nobody is left to tell. What Python would flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    known, code = _as_known(error)
    if logging.getLogger("isthmus").isEnabledFor(logging.DEBUG):
        traceback.print_exception(error, file=sys.stderr)
    print(f"error: {known}", file=sys.stderr)
    if as_json:
        with contextlib.suppress(OSError):
            print_json({**_summary_of(error), "error": _error_value(known), "exit_code": code})
    return code


def _as_known(error: BaseException) -> tuple[IsthmusError, int]:
    """The same error with a message and a hint for people, and its exit code."""
    if isinstance(error, IsthmusError):
        return error, error.exit_code
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "isthmus"
        return UsageError(_sentence(error.format_message()), hint=f"`{command} --help` shows what it takes"), 2
    if isinstance(error, KeyboardInterrupt):
        return IsthmusError("interrupted; nothing that looks finished is left"), 130
    if isinstance(error, MemoryError):
        return IsthmusError("out of memory", hint="export a smaller size, or on a machine with more memory"), 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return IsthmusError(f"{where}{error.strerror or error}"), 1
    text = str(error).strip().partition("\n")[0]
    return IsthmusError(
        f"{type(error).__name__}: {text}", hint="this is a bug: re-run with --log-level debug, and report what it prints"
    ), 1


def _error_value(error: IsthmusError) -> dict[str, Any]:
    reasons = [{"what": r.what, "where": r.where, "fix": r.fix} for r in error.reasons]
    return {"type": type(error).__name__, "message": error.message, "reasons": reasons, "hint": error.hint}


def _summary_of(error: BaseException) -> Mapping[str, Any]:
    return error.result.summary() if isinstance(error, AccuracyError) and error.result is not None else {}


def _sentence(text: str) -> str:
    return (text[:1].lower() + text[1:]).rstrip(".")


# Options that several commands share


def _set_log_level(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    logger = logging.getLogger("isthmus")
    logger.setLevel(value.upper())
    if value == "debug" and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
        logger.addHandler(handler)


def _common(command: F) -> F:
    return click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        expose_value=False,
        is_eager=True,
        callback=_set_log_level,
        help="What stderr shows: info has the progress, debug also tracebacks and the libraries' own messages.",
    )(command)


def _format(choices: Sequence[str] = ("text", "json")) -> Callable[[F], F]:
    return click.option(
        "--format", "style", type=click.Choice(choices), default=choices[0], show_default=True, help="How the result is printed."
    )


def _quiet() -> None:
    """Keeps warnings and the libraries' loggers off stderr, unless the log level is debug."""
    logger = logging.getLogger("isthmus")
    if logger.isEnabledFor(logging.DEBUG):
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


# isthmus, list, doctor


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="isthmus")
@_common
def main() -> None:
    """Carries PyTorch image-generation models to the hardware that serves them, and measures every artifact against PyTorch."""


def _registries() -> dict[str, Registry[Any] | None]:
    from isthmus.exporter.op import OPS
    from isthmus.exporter.spec import MODELS
    from isthmus.exporter.target import TARGETS

    return {"models": MODELS, "targets": TARGETS, "ops": OPS, "calibrators": None}


@main.command("list", short_help="List models, targets, ops and calibrators.")
@click.argument("kind", type=click.Choice(_KINDS), required=False)
@_format(("table", "json"))
@_common
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
@_format()
@_common
def doctor(style: str) -> int:
    """Shows what this machine can lower, build and verify, and what to install for the rest."""
    _quiet()
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
            print(f"  {c.name:<8} {'yes' if c.available else 'no ':<4} {c.detail}")
            if not c.available and c.fix:
                print(f"                fix: {c.fix}")
    if code:
        print("error: no target can lower a model on this machine", file=sys.stderr)
    return code


# export


class _Option(click.Option):
    """An option whose bad value is collected, so that all problems of a call are reported at once."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().process_value(ctx, value)
        except click.UsageError as error:
            name = self.opts[0]
            if self.name and ctx.get_parameter_source(self.name) is click.core.ParameterSource.DEFAULT_MAP:
                name = f"{name} in the --config file"
            what = error.message if isinstance(error, click.BadParameter) else error.format_message()
            ctx.meta.setdefault(_PROBLEMS, []).append(UsageError(f"{name}: {_sentence(what)}"))
            return None


class _Number(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3, for type checkers alone
    """A finite number within bounds."""

    def __init__(self, kind: type[int] | type[float], low: float, high: float) -> None:
        self.name = "n" if kind is int else "x"
        self._kind, self._low, self._high = kind, low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """Reads a text; nan and inf are outside every bound."""
        try:
            number = self._kind(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not self._low <= number <= self._high:
            bounds = f"from {self._low} to {self._high}" if self._high < sys.float_info.max else f"of at least {self._low:g}"
            self.fail(f"got {value!r}, expected a number {bounds}", param, ctx)
        return number


class _ExportCommand(click.Command):
    """The `export` command: its own options, and those of every target's options schema."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        taken = {name for parameter in own for name in parameter.opts}
        return [*own, *(o for o in _target_options().values() if o.opts[0] not in taken)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from isthmus.exporter.call import targets_of_options

        by_target = targets_of_options()
        own = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and p.name not in by_target]
        with formatter.section("Options"):
            formatter.write_dl([record for p in own if (record := p.get_help_record(ctx)) is not None])
        for target in sorted({name for names in by_target.values() for name in names}):
            records = [o.get_help_record(ctx) for name, o in _target_options().items() if target in by_target[name]]
            with formatter.section(f"Options of {target}"):
                formatter.write_dl([record for record in records if record is not None])


def _target_options() -> dict[str, click.Option]:
    """One click option for each field of the targets' options schemas, by the field's name. Values stay texts: the schema reads them."""
    from isthmus.exporter.target import TARGETS

    options: dict[str, click.Option] = {}
    for target in (TARGETS[name] for name in TARGETS):
        for name, field in target.Options.model_fields.items():
            default = field.get_default(call_default_factory=True)
            option = _Option(
                [f"--{name.replace('_', '-')}", name], help=f"{field.description} [default: {default}]", metavar=_metavar(field)
            )
            options.setdefault(name, option)
    return options


def _metavar(field: FieldInfo) -> str:
    if typing.get_origin(field.annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(field.annotation)))
    return field.annotation.__name__.upper() if isinstance(field.annotation, type) else "VALUE"


def _read_config(ctx: click.Context, _parameter: click.Parameter, value: Path | None) -> Path | None:
    """Makes the file's keys the defaults of the options, so that the command line wins."""
    if value is None:
        return None
    from isthmus.exporter.options import load_yaml

    try:
        if value.stat().st_size > _MAX_CONFIG:
            raise UsageError(f"--config: {value} is larger than {_MAX_CONFIG} bytes")
        config = load_yaml(value.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: cannot read {value}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--config: {value}: {error}") from error
    if config is None:
        return value
    if not isinstance(config, dict):
        raise UsageError(f"--config: {value} holds a {type(config).__name__}, expected keys and values such as `target: onnxruntime`")
    names = {p.opts[-1].lstrip("-"): p for p in ctx.command.get_params(ctx) if p.name not in ("config", "help", None) and p.expose_value}
    defaults: dict[str, Any] = {}
    problems: list[IsthmusError] = ctx.meta.setdefault(_PROBLEMS, [])
    for key, given in config.items():
        if (p := names.get(str(key))) is None:
            problems.append(UnknownNameError("key of the --config file", str(key), list(names)))
        elif key == "set":
            if isinstance(given, dict):
                ctx.meta[_CONFIG_SETTINGS] = {str(k): v for k, v in given.items()}
            else:
                problems.append(UsageError(f"set in the --config file: got a {type(given).__name__}, expected keys and values"))
        elif isinstance(given, dict) or (isinstance(given, list) and not p.multiple):
            problems.append(UsageError(f"{key} in the --config file: got a {type(given).__name__}, expected one value"))
        elif given is not None and p.name:
            # As on the command line, every value is a text that its option reads: int(20.5) would pass for an opset.
            defaults[p.name] = [str(item) for item in given] if isinstance(given, list) else [str(given)] if p.multiple else str(given)
    ctx.default_map = defaults
    return value


_bound = _Number(float, 0.0, sys.float_info.max)


@main.command(
    cls=_ExportCommand,
    short_help="Export a model, measured against PyTorch.",
    epilog="MODEL is a name of `isthmus list models`, or module:callable, which returns an nn.Module.",
)
@click.argument("model", required=False)
@click.option("--config", cls=_Option, type=click.Path(path_type=Path), is_eager=True, callback=_read_config, expose_value=False,
              help="YAML file whose keys are these options' names; the command line wins.")  # fmt: skip
@click.option("--target", cls=_Option, metavar="NAME", help="What to export to: a name of `isthmus list targets`.")
@click.option("-o", "--output", cls=_Option, type=click.Path(path_type=Path), help="The bundle's folder. [default: MODEL-TARGET-PRECISION]")
@click.option("--precision", cls=_Option, metavar="P", help="Such as fp32 or fp16. [default: the target's first]")
@click.option("--opset", cls=_Option, type=_Number(int, 1, 1000), metavar="N", help="ONNX opset. [default: the target's]")
@click.option("--batch-size", cls=_Option, type=_Number(int, 1, 2**20), metavar="N", help="Batch size of the example inputs.")
@click.option("--set", "settings", cls=_Option, multiple=True, metavar="KEY=VALUE", help="Changes a setting of the model; repeatable.")
@click.option(
    "--weights",
    cls=_Option,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="A .safetensors file, or a folder in the diffusers layout.",
)
@click.option("--inputs", cls=_Option, metavar="MODULE:CALLABLE", help="Returns the example inputs of a module:callable MODEL.")
@click.option("--dynamic", cls=_Option, multiple=True, metavar="NAME:AXIS=MIN,OPT,MAX", help="Makes an input's axis dynamic; repeatable.")
@click.option("--atol", cls=_Option, type=_bound, help="Bound on |error| - rtol * |reference|, elementwise.")
@click.option("--rtol", cls=_Option, type=_bound, help="See --atol.")
@click.option("--min-psnr", cls=_Option, type=_bound, metavar="DB", help="Bound on the PSNR, in dB.")
@click.option("--seed", cls=_Option, type=_Number(int, 0, 2**63 - 1), default=0, show_default=True,
              help="Seed of random inputs and weights.")  # fmt: skip
@click.option("--force", cls=_Option, is_flag=True, help="Replace a bundle that exists.")
@click.option("--dry-run", cls=_Option, is_flag=True, help="Check the call and print the plan, write nothing.")
@_format()
@_common
@click.pass_context
def export(ctx: click.Context, /, style: str, **given: Any) -> int:
    """Exports MODEL to a target, measures it against PyTorch, and writes a bundle."""
    from isthmus.exporter.call import checked

    problems: list[IsthmusError] = ctx.meta.get(_PROBLEMS, [])
    arguments = checked(given, config_settings=ctx.meta.get(_CONFIG_SETTINGS, {}), problems=problems)
    _quiet()
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


# verify, inspect, report

_bundle = click.argument("bundle", type=click.Path(path_type=Path))


def _opened(bundle: Path) -> Path:
    """Refuses what is not a bundle, before torch is imported."""
    from isthmus.exporter.bundle import read_manifest

    read_manifest(bundle)
    return bundle


@main.command(short_help="Check a bundle's files, then its accuracy.")
@_bundle
@_format()
@_common
def verify(bundle: Path, style: str) -> int:
    """Checks BUNDLE's integrity (sha256), then its accuracy again."""
    _opened(bundle)
    _quiet()
    from isthmus import pipeline

    try:
        result = pipeline.verify(bundle, progress=Progress())
    except AccuracyError as error:
        if style == "text":
            print_verified(error.result)
        raise
    if style == "json":
        print_json(result.summary())
    else:
        print_verified(result)
    return result.exit_code


@main.command(short_help="Show what a bundle is.")
@_bundle
@_format()
@_common
def inspect(bundle: Path, style: str) -> None:
    """Shows what BUNDLE is: model, target, inputs, outputs, operators, weights, verdicts."""
    _opened(bundle)
    _quiet()
    from isthmus import pipeline

    value = pipeline.inspect(bundle)
    if style == "json":
        print_json(value)
    else:
        print_fields(value)


@main.command(short_help="Rebuild a bundle's report, print its path.")
@_bundle
@_format()
@_common
def report(bundle: Path, style: str) -> None:
    """Rebuilds BUNDLE's accuracy report if need be, and prints where it is."""
    _opened(bundle)
    _quiet()
    from isthmus import pipeline

    path = pipeline.report(bundle)
    if style == "json":
        print_json({"report": str(path)})
    else:
        print(path)


if __name__ == "__main__":
    main()
