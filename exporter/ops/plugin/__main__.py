"""`python -m isthmus.exporter.ops.plugin`: builds the TensorRT plugin library, and prints where it is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...errors import IsthmusError
from ...op import OPS
from ..gpu.compile import ARCHITECTURES
from . import headers
from .build import build


def main(arguments: list[str]) -> int:
    """The command line. Exit codes are those of `isthmus.exporter.errors`."""
    parser = argparse.ArgumentParser(prog="python -m isthmus.exporter.ops.plugin", description=__doc__)
    parser.add_argument("--tensorrt", type=Path, metavar="FOLDER", help="TensorRT's folder (TENSORRT_ROOT)")
    parser.add_argument("--arch", action="append", choices=sorted(ARCHITECTURES), help="only this architecture; may be given several times")
    parser.add_argument("--no-kernels", action="store_true", help="compile no kernel: such a library builds plans, and launches nothing")
    parser.add_argument("--operator", action="append", choices=sorted(OPS), help="only this operator; may be given several times")
    parser.add_argument("--fetch-headers", action="store_true", help="download TensorRT's headers for development first")
    options = parser.parse_args(arguments)
    try:
        if options.fetch_headers:
            headers.fetch()
        architectures = () if options.no_kernels else tuple(options.arch or ARCHITECTURES)
        print(build(options.tensorrt, architectures, options.operator))
    except IsthmusError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
