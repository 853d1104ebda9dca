"""`python -m isthmus.targets.tensorrt.child REQUEST RESULT`: compiles one engine, in a process that the library may end.

Reads a `compiler.Request` and writes a `compiler.Outcome`, both JSON. The exit status is 0 where there is an outcome, a refusal included.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from .compiler import Request, compile_engine, write_atomically


def main(arguments: list[str]) -> int:
    """Compiles; see the module's docstring."""
    request = Request.model_validate_json(Path(arguments[0]).read_bytes())
    outcome = compile_engine(import_first(request.modules), request)
    outcome = outcome.model_copy(update={"peak_rss": peak_rss()})
    write_atomically(Path(arguments[1]), outcome.model_dump_json().encode())
    return 0


def import_first(names: tuple[str, ...]) -> Any:
    """The first of some modules that is there.

    Raises:
        ImportError: None is, or the one that is there cannot be imported.
    """
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    return importlib.import_module(names[-1])


def peak_rss() -> int:
    """The most memory that this process held, in bytes; 0 where the system does not say.

    Not `getrusage`: its maximum is inherited from the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
