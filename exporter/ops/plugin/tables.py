"""Writes the launch plans of the operators as C++ tables, and the compiled kernels as an assembler file that includes them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...op import CustomOp
from ..gpu import plan as plans
from ..gpu.compile import ARCHITECTURES, compile_launch
from ..gpu.expressions import cpp

ELEMENTS = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "float8_e4m3fn": "float8", "int32": "int32"}
"""The enumerators of the C++ `Element`."""


STUB_SHARED = 50_000
"""The shared memory that a stub asks for: more than a launch gets unless the function's limit is raised."""


@dataclass(frozen=True)
class Image:
    """What the library holds of a kernel for an architecture.

    Attributes:
        architecture: Key of `gpu.compile.ARCHITECTURES`.
        shared: Dynamic shared memory, in bytes.
        code: The machine code; in a library without kernels, a text that names the launch, see `stub`.
    """

    architecture: str
    shared: int
    code: bytes


@dataclass
class Tables:
    """The generated sources.

    Attributes:
        source: C++: the plans and the list of operators.
        assembly: For the assembler: every image under a symbol, from files whose names are in `files`.
        files: Contents of the files that `assembly` includes.
    """

    source: str = ""
    assembly: str = ""
    files: dict[str, bytes] = field(default_factory=dict)


def stub(op: CustomOp, plan: plans.Plan, index: int) -> str:
    """What stands for an image in a library without kernels: JSON that names operator, form, dtype, plan and launch."""
    return json.dumps([op.name, plan.form, plan.dtype, plan.name, index])


def images(op: CustomOp, plan: plans.Plan, index: int, architectures: Sequence[str]) -> tuple[Image, ...]:
    """A launch's kernel for each architecture; without architectures, one stub, which passes for every kernel of compute capability 9.0.

    Raises:
        MachineError: Triton is needed to compile, and missing.
    """
    if not architectures:
        return (Image("sm_90a", STUB_SHARED, stub(op, plan, index).encode() + b"\0"),)
    compiled = ((name, compile_launch(op, plan, plan.launches[index], name)) for name in architectures)
    return tuple(Image(name, one.facts.shared, one.cubin) for name, one in compiled)


def generate(operators: Iterable[CustomOp], architectures: Sequence[str]) -> Tables:
    """The tables of some operators, whose plans are those of their GPU parts; an operator without one has no plans.

    Args:
        operators: Those with a TensorRT part.
        architectures: Keys of `gpu.compile.ARCHITECTURES`; none for a library that only records its launches.

    Raises:
        MachineError: Triton is needed to compile, and missing.
        IsthmusError: A plan is wrong.
    """
    tables = Tables()
    chosen = tuple(operators)
    symbols: dict[str, str] = {}
    declarations, rows = [], []
    number = itertools.count()
    functions: dict[str, str] = {}
    for op in chosen:
        if not op.has("gpu"):
            continue
        every = op.part("gpu").plans()
        plans.check(op, every)
        for plan in every:
            prefix = f"plan_{next(number)}"
            found = [_add(tables, symbols, images(op, plan, i, architectures)) for i in range(len(plan.launches))]
            declarations.append(_plan(op, plan, prefix, found, functions))
            rows.append(f"    {prefix}_row,")
    externs = [f"extern const unsigned char {symbol}[];" for symbol in symbols.values()]
    tables.source = _SOURCE.format(
        images="\n".join(externs),
        operators="\n".join(f"extern const Operator {op.name};" for op in chosen),
        functions="\n".join(
            f"std::int64_t {name}([[maybe_unused]] const std::int64_t* v) {{ return {text}; }}" for text, name in functions.items()
        ),
        plans="\n".join(declarations),
        rows="\n".join(rows),
        list=", ".join(f"&{op.name}" for op in chosen),
    )
    tables.assembly = _ASSEMBLY.format(images="\n".join(_ASSEMBLY_IMAGE.format(symbol=s, file=f"{d}.bin") for d, s in symbols.items()))
    return tables


def _add(tables: Tables, symbols: dict[str, str], found: tuple[Image, ...]) -> str:
    rows = []
    for image in found:
        digest = hashlib.sha256(image.code).hexdigest()
        symbol = symbols.setdefault(digest, f"isthmus_image_{len(symbols)}")
        tables.files[f"{digest}.bin"] = image.code
        # Code for sm_90a and, as Triton writes it, for sm_120 is of that architecture alone.
        specific = "false" if image.architecture == "sm_89" else "true"
        rows.append(f"{{{ARCHITECTURES[image.architecture]}, {specific}, {image.shared}, {symbol}, {len(image.code)}}}")
    return ", ".join(rows)


def _plan(op: CustomOp, plan: plans.Plan, prefix: str, launch_images: Sequence[str], functions: dict[str, str]) -> str:
    inputs, outputs = plans.arguments_of(op, plan)
    shapes = (dim for a in (*inputs, *outputs) for dim in a.shape if isinstance(dim, str))
    names = list(dict.fromkeys(factor for dim in shapes for factor in dim.removesuffix("-1").split("*")))
    names += [a.name for a in op.attributes if a.type in (bool, int) and a.name not in names]
    where = {name: f"v[{i}]" for i, name in enumerate((*names, *plan.sizes))}

    def expression(text: str) -> str:
        # Most expressions occur in many plans: one function each, found by its text.
        return functions.setdefault(cpp(text, where), f"expression_{len(functions)}")

    dtypes = plans.dtypes(op, plan)
    sizes = " ".join(f"{where[name]} = {cpp(text, where)};" for name, text in plan.sizes.items())
    lines = [
        _array("char* const", f"{prefix}_values", [f'"{name}"' for name in names]),
        _array("Tensor", f"{prefix}_tensors", [f'{{"{a.name}", Element::{ELEMENTS[dtypes[a.name]]}}}' for a in (*inputs, *outputs)]),
    ]
    if plan.workspace:
        spaces = [
            f'{{"{w.name}", Element::{ELEMENTS[w.dtype]}, {expression(" * ".join(f"({d})" for d in w.shape))}}}' for w in plan.workspace
        ]
        lines.append(_array("Workspace", f"{prefix}_workspace", spaces))
    launches = []
    for i, launch in enumerate(plan.launches):
        parameters = [
            f'{{Kind::pointer, "{p.text}", nullptr}}'
            if p.kind == "pointer"
            else f'{{Kind::real, "{p.text}", nullptr}}'
            if p.kind == "float"
            else f'{{Kind::integer, "{p.name}", {expression(p.text)}}}'
            for p in plans.parameters(op, plan, launch)
        ]
        lines.append(_array("Parameter", f"{prefix}_parameters_{i}", parameters))
        lines.append(_array("Image", f"{prefix}_images_{i}", [launch_images[i]]))
        grid = ", ".join(expression(text) for text in launch.grid)
        launches.append(
            f'{{"{launch.name}", {32 * launch.warps}, {expression(launch.when)}, {{{grid}}}, {prefix}_parameters_{i}, {len(parameters)}, '
            f"{prefix}_images_{i}, std::size({prefix}_images_{i})}}"
        )
    lines.append(_array("Launch", f"{prefix}_launches", launches))
    workspace = f"{prefix}_workspace" if plan.workspace else "nullptr"
    lines.append(
        f'const Plan {prefix}_row{{"{plan.form}", "{plan.name}", Element::{ELEMENTS[plan.dtype]}, {expression(plan.fits)}, '
        f"{expression(plan.prefer)}, {prefix}_values, {len(names)}, []([[maybe_unused]] std::int64_t* v) {{ {sizes} }}, {len(plan.sizes)}, "
        f"{prefix}_tensors, {len(inputs) + len(outputs)}, {workspace}, {len(plan.workspace)}, {prefix}_launches, {len(launches)}}};"
    )
    return "\n".join(lines)


def _array(kind: str, name: str, rows: Sequence[str]) -> str:
    return f"const {kind} {name}[] = {{{', '.join(rows)}}};"


_SOURCE = """\
// Generated by isthmus.exporter.ops.plugin.tables.
#include <iterator>

#include "launch.h"

extern "C" {{
{images}
}}

namespace isthmus {{

{operators}

namespace {{

{functions}

{plans}

}}  // namespace

const std::vector<Plan>& plans() {{
  static const std::vector<Plan> all{{
{rows}
  }};
  return all;
}}

const std::vector<const Operator*>& operators() {{
  static const std::vector<const Operator*> all{{{list}}};
  return all;
}}

}}  // namespace isthmus
"""

_ASSEMBLY = """\
# Generated by isthmus.exporter.ops.plugin.tables.
    .section .note.GNU-stack,"",%progbits
    .section .rodata
{images}
"""

_ASSEMBLY_IMAGE = """\
    .balign 64
    .globl {symbol}
    .hidden {symbol}
{symbol}:
    .incbin "{file}"
"""
