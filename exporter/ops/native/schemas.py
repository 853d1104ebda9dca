"""Writes the operators' schemas as C++: names of inputs, sizes and attributes for the kernels, tables for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...op import Argument, CustomOp

_TYPES = {bool: "b", int: "i", float: "f", str: "s"}
_LEVELS_X86 = ("baseline", "avx2", "avx2x16", "avx512")


def header(ops: Iterable[CustomOp]) -> str:
    """`schemas.h`: one namespace an operator, with the position of every input, output, size and attribute."""
    lines = ["// Generated from the operators' schemas.", "#pragma once", ""]
    for op in ops:
        lines.append(f"namespace isthmus::schemas::{op.name} {{")
        for prefix, names in (
            ("", [a.name for a in op.inputs]),
            ("out_", [a.name for a in op.outputs]),
            ("size_", size_names(op)),
            ("attribute_", [a.name for a in op.attributes]),
        ):
            if names:
                lines.append("enum { " + ", ".join(prefix + name for name in names) + " };")
        lines.append("}")
    return "\n".join([*lines, ""])


def tables(ops: Iterable[CustomOp]) -> str:
    """`schemas.cpp`: what `operators.h` and `probe.h` declare as generated."""
    ops = list(ops)
    lines = ["// Generated from the operators' schemas.", '#include "operators.h"', '#include "probe.h"', "", "namespace isthmus {", ""]
    for macro, levels in (("ISTHMUS_X86_LEVELS", _LEVELS_X86), ("!ISTHMUS_X86_LEVELS", _LEVELS_X86[:1])):
        lines.append(f"#if {macro}")
        for level in levels:
            lines.append(f"namespace {level} {{ void probe(int, const float*, float*, int64_t, int64_t);")
            lines += [f"void {op.name}(const Call&);" for op in ops]
            lines.append("}")
        lines.append(f"#define EVERY_LEVEL(function) {', '.join(f'{level}::function' for level in levels)}")
        lines.append("#endif")
    lines += [
        "",
        "const std::vector<Probe>& probes() {",
        "  static const std::vector<Probe> all = {EVERY_LEVEL(probe)};",
        "  return all;",
        "}",
    ]
    lines += ["", "const std::vector<Operator>& operators() {", "  static const std::vector<Operator> all = {"]
    lines += [f"    {_operator(op)}," for op in ops]
    return "\n".join([*lines, "  };", "  return all;", "}", "", "}  // namespace isthmus", ""])


def size_names(op: CustomOp) -> list[str]:
    """Every name in the shapes of an operator, in the order of appearance."""
    names: dict[str, None] = {}
    for argument in (*op.inputs, *op.outputs):
        for dim in argument.shape:
            if isinstance(dim, str):
                names |= dict.fromkeys(dim.removesuffix("-1").split("*"))
    return list(names)


def _operator(op: CustomOp) -> str:
    sizes = size_names(op)
    attributes = ", ".join(f"{{\"{a.name}\", '{_TYPES[a.type]}', {sizes.index(a.name) if a.name in sizes else -1}}}" for a in op.attributes)
    parts = (
        f'"{op.name}"',
        _braces(f'"{name}"' for name in sizes),
        _braces(_argument(a, sizes) for a in op.inputs),
        _braces(_argument(a, sizes) for a in op.outputs),
        f"{{{attributes}}}",
        _braces(_form(op, i) for i in range(len(op.forms))),
        f"{{EVERY_LEVEL({op.name})}}",
    )
    return _braces(parts)


def _argument(a: Argument, sizes: list[str]) -> str:
    shape = _braces(_dimension(dim, sizes) for dim in a.shape)
    return _braces((f'"{a.name}"', str(len(a.shape)), shape, _bool(a.wide), _bool(a.optional)))


def _dimension(dim: str | int, sizes: list[str]) -> str:
    if isinstance(dim, int):
        return f"{{{dim}, 0, 0, {{}}}}"
    factors = [str(sizes.index(name)) for name in dim.removesuffix("-1").split("*")]
    return f"{{1, {int(dim.endswith('-1'))}, {len(factors)}, {_braces(factors)}}}"


def _form(op: CustomOp, index: int) -> str:
    form = op.forms[index]
    inputs = [a.name for a in op.inputs]
    attributes = [a.name for a in op.attributes]
    fixed = _braces(f"{{{attributes.index(name)}, {_value(value)}}}" for name, value in form.fixed.items())
    return _braces((f'"{form.op_type}"', _braces(str(inputs.index(name)) for name in form.inputs), fixed))


def _value(value: Any) -> str:
    return f'0.0, "{value}"' if isinstance(value, str) else f"{float(value)!r}, nullptr"


def _braces(parts: Iterable[str]) -> str:
    return "{" + ", ".join(parts) + "}"


def _bool(value: bool) -> str:
    return "true" if value else "false"
