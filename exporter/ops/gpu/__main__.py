"""`python -m isthmus.exporter.ops.gpu`: compiles every kernel of every operator, and prints what the compiler made of it as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...op import OPS, CustomOp
from .compile import ARCHITECTURES, compile_launch, opcodes
from .plan import Launch, Plan

GOLDEN_FIELDS = ("registers", "spills", "shared", "static_shared", "warps")
"""The facts that the golden file holds."""


def table(
    architecture: str, operators: tuple[str, ...] = (), *, disassemble: bool = True, sample: bool = False
) -> Iterator[dict[str, Any]]:
    """One row a launch: operator, plan, the fields of `compile.Facts`, and the opcodes.

    Args:
        architecture: Key of `compile.ARCHITECTURES`.
        operators: Only these.
        disassemble: Whether to count the opcodes, which takes longer than compiling.
        sample: Only the first and the last launch of each kernel function for float16.
    """
    for name in operators or tuple(OPS):
        op = OPS[name]
        if not op.has("gpu"):
            continue
        for plan, label, launch in _sample(op) if sample else _launches(op):
            compiled = compile_launch(op, plan, launch, architecture)
            row = {"operator": name, "form": plan.form, "dtype": plan.dtype, "plan": plan.name, "launch": label}
            row |= asdict(compiled.facts)
            yield row | {"opcodes": opcodes(compiled)} if disassemble else row


def _launches(op: CustomOp) -> Iterator[tuple[Plan, str, Launch]]:
    """Every launch, with a name that is its own within the plan: the kernel's, and a number from the second of that kernel on."""
    for plan in op.part("gpu").plans():
        count: dict[str, int] = {}
        for launch in plan.launches:
            count[launch.name] = count.get(launch.name, 0) + 1
            yield plan, launch.name + (f" {count[launch.name]}" if count[launch.name] > 1 else ""), launch


def _sample(op: CustomOp) -> list[tuple[Plan, str, Launch]]:
    """The first and the last launch of each kernel function for float16, which have the least and the most work among its constants."""
    first: dict[str, tuple[Plan, str, Launch]] = {}
    last: dict[str, tuple[Plan, str, Launch]] = {}
    for row in _launches(op):
        if row[0].dtype == "float16":
            first.setdefault(row[2].name, row)
            last[row[2].name] = row
    return [*first.values(), *(row for name, row in last.items() if row is not first[name])]


def golden(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The golden file's contents: the facts that are held, by operator/form/dtype/plan/launch."""
    key = ("operator", "form", "dtype", "plan", "launch")
    return {"/".join(row[k] for k in key): {field: row[field] for field in GOLDEN_FIELDS} for row in rows}


def differences(found: Mapping[str, Mapping[str, Any]], recorded: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is not as the golden file has it, and every kernel that spills: one line each."""
    lines = [f"{name}: spills {facts['spills']} bytes" for name, facts in found.items() if facts["spills"]]
    lines += [f"{name}: is not recorded" for name in found if name not in recorded]
    lines += [f"{name}: is recorded, and no kernel of that name is compiled" for name in recorded if name not in found]
    for name in found.keys() & recorded.keys():
        changed = [f"{k} {recorded[name].get(k)} -> {v}" for k, v in found[name].items() if recorded[name].get(k) != v]
        if changed:
            lines.append(f"{name}: {', '.join(changed)}")
    return sorted(lines)


def main(arguments: list[str]) -> int:
    """The command line: 0 when all is well, 1 when `--check` finds a difference or `--golden` a spill."""
    parser = argparse.ArgumentParser(prog="python -m isthmus.exporter.ops.gpu", description=__doc__)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="sm_90a")
    parser.add_argument("--operator", action="append", default=[], help="only this operator; may be given several times")
    parser.add_argument("--golden", type=Path, help="write the golden file here instead of printing")
    parser.add_argument("--check", action="store_true", help="compare with the golden file instead of writing it")
    options = parser.parse_args(arguments)
    if options.check and options.golden is None:
        parser.error("--check needs --golden FILE")
    if options.golden is None:
        print(json.dumps(list(table(options.arch, tuple(options.operator))), indent=1))
        return 0
    rows = list(table(options.arch, tuple(options.operator), disassemble=False))
    found = golden(rows)
    recorded = found
    if options.check:
        recorded = json.loads(options.golden.read_text("utf-8"))
        if options.operator:
            recorded = {name: facts for name, facts in recorded.items() if name.split("/")[0] in options.operator}
    wrong = differences(found, recorded)
    for line in wrong:
        print(line, file=sys.stderr)
    if options.check:
        print(f"{len(found)} launches of {len({row['operator'] for row in rows})} operators, {len(wrong)} differences")
        return int(bool(wrong))
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=options.golden.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(options.golden)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
