"""The exceptions that isthmus raises, and the reasons that they carry.

Every exception knows its exit code, so that the command line and a Python caller see the same outcome::

    IsthmusError            1  something failed
    ├── UsageError          2  the call itself is wrong
    │   └── UnknownNameError   no such model, target, option, …; lists the near names
    ├── WeightsError        1  a weights file that cannot be used as asked
    ├── IntegrityError      1  a bundle whose files are not what its manifest says
    ├── AccuracyError       3  the artifact was written, and is not close enough to PyTorch
    ├── UnsupportedError    4  the target cannot take the model; carries every reason
    └── MachineError        5  this machine lacks the hardware or the toolchain
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reason:
    """One fact that stands in the way, as a value that can be collected.

    Attributes:
        what: What happened, with what was got and what was expected.
        where: The PyTorch module path, node or file that it concerns; empty when it concerns the whole model.
        fix: What the user can do about it; empty when nothing is known.
    """

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} (fix: {self.fix})" if self.fix else text


class IsthmusError(Exception):
    """Something failed. `message` says what, `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", reasons: Iterable[Reason] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.reasons: tuple[Reason, ...] = tuple(reasons)

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {reason}" for reason in self.reasons)]
        return "\n".join([*lines, f"hint: {self.hint}"] if self.hint else lines)


class UsageError(IsthmusError):
    """The call itself is wrong: an option, a name, a value or a path."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that no registry holds."""

    def __init__(self, kind: str, name: str, known: Sequence[str], *, hint: str = "") -> None:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        guess = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known)) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}", hint=f"{guess} {hint}".strip())
        self.near = tuple(near)


class WeightsError(IsthmusError):
    """A weights file that is damaged, of a refused format, or does not fit the model."""


class IntegrityError(IsthmusError):
    """A bundle whose files are not what its manifest says."""


class AccuracyError(IsthmusError):
    """The artifact was written, and at least one stage is outside its tolerance. `result` is what the call would have returned."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "", reasons: Iterable[Reason] = (), result: Any = None) -> None:
        super().__init__(message, hint=hint, reasons=reasons)
        self.result = result


class UnsupportedError(IsthmusError):
    """The target cannot take this model: `reasons` holds every reason found, not only the first."""

    exit_code = 4


class MachineError(IsthmusError):
    """This machine lacks the hardware or the toolchain that the step needs."""

    exit_code = 5
