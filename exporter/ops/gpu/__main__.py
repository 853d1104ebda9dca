"""`python -m isthmus.exporter.ops.gpu`: compiles every kernel of every operator, and prints what the compiler made of it as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...op import OPS
from .compile import ARCHITECTURES, compile_plan, opcodes

GOLDEN_FIELDS = ("registers", "spills", "shared", "static_shared", "warps")
"""The facts that the golden file holds."""


def table(architecture: str, operators: tuple[str, ...] = (), *, disassemble: bool = True) -> Iterator[dict[str, Any]]:
    """One row a kernel: operator, plan, the fields of `compile.Facts`, and the opcodes."""
    for name in operators or tuple(OPS):
        op = OPS[name]
        if not op.has("gpu"):
            continue
        for plan in op.part("gpu").plans():
            for compiled in compile_plan(op, plan, architecture):
                row = {"operator": name, "form": plan.form, "dtype": plan.dtype, "plan": plan.name}
                row |= asdict(compiled.facts)
                yield row | {"opcodes": opcodes(compiled)} if disassemble else row


def golden(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The golden file's contents: the facts that are held, by operator/form/dtype/plan/kernel."""
    key = ("operator", "form", "dtype", "plan", "name")
    return {"/".join(row[k] for k in key): {field: row[field] for field in GOLDEN_FIELDS} for row in rows}


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m isthmus.exporter.ops.gpu", description=__doc__)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="sm_90a")
    parser.add_argument("--operator", action="append", default=[], help="only this operator; may be given several times")
    parser.add_argument("--golden", type=Path, help="write the golden file here instead of printing")
    options = parser.parse_args(arguments)
    rows = list(table(options.arch, tuple(options.operator), disassemble=options.golden is None))
    if options.golden is None:
        print(json.dumps(rows, indent=1))
        return 0
    text = json.dumps(golden(rows), indent=1, sort_keys=True) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=options.golden.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(options.golden)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
