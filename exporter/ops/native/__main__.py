"""`python -m isthmus.exporter.ops.native`: builds the library, prints its path."""

from __future__ import annotations

import argparse
import sys

from ...errors import IsthmusError, MachineError
from .cmake import build


def main() -> int:
    """Builds the library. Exit codes: 0 built or there already, 1 the build failed, 5 a tool is missing."""
    parser = argparse.ArgumentParser(prog="python -m isthmus.exporter.ops.native", description="Builds the native CPU kernels.")
    parser.add_argument("--force", action="store_true", help="build it also when it is there")
    parser.add_argument("--optional", action="store_true", help="a missing tool is a note, not an error")
    arguments = parser.parse_args()
    try:
        sys.stdout.write(f"{build(force=arguments.force)}\n")
    except MachineError as error:
        sys.stderr.write(f"{'note' if arguments.optional else 'error'}: {error}\n")
        return 0 if arguments.optional else error.exit_code
    except IsthmusError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
