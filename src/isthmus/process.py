"""What the command line's process ends with: every exception becomes one message on stderr, and one of the exit codes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from isthmus.exporter.errors import AccuracyError, IsthmusError, UnknownNameError, UsageError
from isthmus.terminal import print_json


class Commands(click.Group):
    """The group of commands. Turns every exception into one message and an exit code."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any) -> NoReturn:
        """Runs a command and ends the process."""
        arguments = list(sys.argv[1:] if args is None else args)
        extra.pop("standalone_mode", None)
        if hasattr(signal, "SIGTERM"):
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, _terminated)
        if args is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, functools.partial(_interrupt, as_json=_wants_json(arguments)))
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
        """The command of that name; an unknown one is answered with the near names."""
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


def _interrupt(number: int, frame: FrameType | None, *, as_json: bool) -> None:
    """Raises KeyboardInterrupt, as Python does; but ends the process at once while torch is being imported.

    An exception that passes through the C++ of torch's import aborts the process (pybind11 calls std::terminate, seen with torch 2.13).
    Nothing has been written by then.
    """
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
        code = _fail(KeyboardInterrupt(), as_json=as_json)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    signal.default_int_handler(number, frame)


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
        return UsageError(sentence(error.format_message()), hint=f"`{command} --help` shows what it takes"), 2
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


def sentence(text: str) -> str:
    """A message of click's as a part of one of ours."""
    return (text[:1].lower() + text[1:]).rstrip(".")
