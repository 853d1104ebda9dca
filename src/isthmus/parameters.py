"""The parameters of the commands: their types, those that several commands share, and where their values come from.

The bad values of an export are collected, so that all of them are reported at once; a configuration file gives defaults; and the targets'
options schemas become options of the command.
"""

from __future__ import annotations

import logging
import math
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from isthmus.exporter.errors import IsthmusError, UnknownNameError, UsageError
from isthmus.process import sentence

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

F = TypeVar("F", bound=Callable[..., Any])

PROBLEMS = "isthmus.problems"
CONFIG_SETTINGS = "isthmus.config_settings"
_MAX_CONFIG = 2**20


def _set_log_level(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    logger = logging.getLogger("isthmus")
    logger.setLevel(value.upper())
    if value == "debug" and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
        logger.addHandler(handler)


def common(command: F) -> F:
    """Adds the options that every command has."""
    return click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        expose_value=False,
        is_eager=True,
        callback=_set_log_level,
        help="What stderr shows: info has the progress, debug also tracebacks and the libraries' own messages.",
    )(command)


def format_option(choices: Sequence[str] = ("text", "json")) -> Callable[[F], F]:
    """Adds the choice of how the result is printed, the default first."""
    return click.option(
        "--format", "style", type=click.Choice(choices), default=choices[0], show_default=True, help="How the result is printed."
    )


def quiet() -> None:
    """Keeps warnings and the libraries' loggers off stderr, unless the log level is debug."""
    logger = logging.getLogger("isthmus")
    if logger.isEnabledFor(logging.DEBUG):
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


class Option(click.Option):
    """An option whose bad value is collected, so that all problems of a call are reported at once."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """The value, or None when it is bad."""
        try:
            return super().process_value(ctx, value)
        except click.UsageError as error:
            name = self.opts[0]
            if self.name and ctx.get_parameter_source(self.name) is click.core.ParameterSource.DEFAULT_MAP:
                name = f"{name} in the --config file"
            what = error.message if isinstance(error, click.BadParameter) else error.format_message()
            ctx.meta.setdefault(PROBLEMS, []).append(UsageError(f"{name}: {sentence(what)}"))
            return None


class Number(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3, for type checkers alone
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


class ExportCommand(click.Command):
    """The `export` command: its own options, and those of every target's options schema."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """All options; an own one wins over a target's of the same name."""
        own = super().get_params(ctx)
        taken = {name for parameter in own for name in parameter.opts}
        return [*own, *(o for o in _target_options().values() if o.opts[0] not in taken)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes each target's options under its name."""
        from isthmus.exporter.call import targets_of_options

        by_target = targets_of_options()
        own = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and p.name not in by_target]
        with formatter.section("Options"):
            formatter.write_dl([record for p in own if (record := p.get_help_record(ctx)) is not None])
        for target in sorted({name for names in by_target.values() for name in names}):
            # Targets can have options of one name that mean different things: each section tells of its own.
            records = [o.get_help_record(ctx) for o in _options_of(target)]
            with formatter.section(f"Options of {target}"):
                formatter.write_dl([record for record in records if record is not None])


def _target_options() -> dict[str, click.Option]:
    """One click option for each field name of the targets' options schemas. Values stay texts: the schema reads them."""
    from isthmus.exporter.target import TARGETS

    options: dict[str, click.Option] = {}
    for target in TARGETS:
        for option in _options_of(target):
            assert option.name is not None
            options.setdefault(option.name, option)
    return options


def _options_of(target: str) -> list[click.Option]:
    from isthmus.exporter.target import TARGETS

    options: list[click.Option] = []
    for name, field in TARGETS[target].Options.model_fields.items():
        default = field.get_default(call_default_factory=True)
        text = f"{field.description} [default: {default}]"
        options.append(Option([f"--{name.replace('_', '-')}", name], help=text, metavar=_metavar(field)))
    return options


def _metavar(field: FieldInfo) -> str:
    if typing.get_origin(field.annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(field.annotation)))
    return field.annotation.__name__.upper() if isinstance(field.annotation, type) else "VALUE"


def read_config(ctx: click.Context, _parameter: click.Parameter, value: Path | None) -> Path | None:
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
    problems: list[IsthmusError] = ctx.meta.setdefault(PROBLEMS, [])
    for key, given in config.items():
        if (p := names.get(str(key))) is None:
            problems.append(UnknownNameError("key of the --config file", str(key), list(names)))
        elif key == "set":
            if isinstance(given, dict):
                ctx.meta[CONFIG_SETTINGS] = {str(k): v for k, v in given.items()}
            else:
                problems.append(UsageError(f"set in the --config file: got a {type(given).__name__}, expected keys and values"))
        elif isinstance(given, dict) or (isinstance(given, list) and not p.multiple):
            problems.append(UsageError(f"{key} in the --config file: got a {type(given).__name__}, expected one value"))
        elif given is not None and p.name:
            # As on the command line, every value is a text that its option reads: int(20.5) would pass for an opset.
            defaults[p.name] = [str(item) for item in given] if isinstance(given, list) else [str(given)] if p.multiple else str(given)
    ctx.default_map = defaults
    return value
