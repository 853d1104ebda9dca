"""From a PyTorch module to a traced program (`torch.export.ExportedProgram`), module scopes kept."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import linecache
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import IsthmusError, Reason, UnsupportedError, UsageError
from .ops.gpu import expressions
from .quiet import quiet
from .spec import SizeRange

if TYPE_CHECKING:
    import torch
    from torch import nn


def trace(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    ranges: Mapping[str, SizeRange] | None = None,
) -> torch.export.ExportedProgram:
    """Traces `module` with `torch.export`.

    The module is traced in non-strict mode first, as torch recommends, and in strict mode when that fails: each captures code that the
    other does not. Dynamic sizes are traced as named dimensions first, and as unnamed ones when the module relates them to each other
    (`2 * h`), which a named dimension does not allow.

    Args:
        module: In eval mode.
        inputs: Example inputs in the order of `forward`. A dynamic axis needs a size of at least 2 here, because torch.export treats
            sizes 0 and 1 as constants.
        dynamic: For each input, the axes that may vary and the named size on each.
        ranges: The range of each named size.

    Raises:
        UsageError: A dynamic axis that does not exist, or whose example size is below 2 or outside its range.
        UnsupportedError: torch.export does not capture the module; the reasons name the line of the user's code. Or it does so for some
            sizes of the ranges only, because others are fixed in the module; the reasons say which.
    """
    import torch

    dynamic = dynamic or {}
    ranges = ranges or {}
    reasons = _bad_axes(inputs, dynamic, ranges)
    if reasons:
        raise UsageError("the dynamic axes do not fit the example inputs", reasons=reasons)

    failures: list[Exception] = []
    for strict in (False, True):
        for named in (True, False) if dynamic else (True,):
            try:
                with torch.no_grad(), quiet("torch._dynamo", "torch.fx", "torch.export"):
                    program = torch.export.export(
                        module, tuple(inputs.values()), dynamic_shapes=_dimensions(module, inputs, dynamic, ranges, named), strict=strict
                    )
            except Exception as error:  # torch.export raises whatever the user's code and its own layers raise
                failures.append(error)
                continue
            if reasons := list(_fixed_sizes(program, dynamic, ranges)):
                raise UnsupportedError(f"sizes that are to vary are fixed in {type(module).__name__}", reasons=reasons)
            return program
    raise UnsupportedError(
        f"torch.export does not capture {type(module).__name__}",
        reasons=_unique(_reason(error) for error in failures),
        hint="rewrite that line without data-dependent Python (torch.where, torch.cond, fixed sizes), or wrap the module in one that does; "
        "TORCH_LOGS=+dynamic shows torch's own account",
    ) from failures[0]


def _fixed_sizes(
    program: torch.export.ExportedProgram, dynamic: Mapping[str, Mapping[int, str]], ranges: Mapping[str, SizeRange]
) -> Iterator[Reason]:
    """What the trace takes for granted of the sizes, and what their ranges do not keep: an expression of sizes that has to be one number.

    torch.export 2.13 captures a module that adds a table of 16 positions to height * width of them, and notes in `_guards_code` that the
    product is 16; it has no public name. Notes of other forms (an even size, two equal ones) say how sizes may vary, not that they do not.
    """
    for guard in dict.fromkeys(getattr(program, "_guards_code", ())):
        axes: dict[str, tuple[str, int]] = {}

        def name(match: re.Match[str], axes: dict[str, tuple[str, int]] = axes) -> str:
            variable = f"size_{match[1]}_{match[2]}"
            axes[variable] = (match[1], int(match[2]))
            return variable

        left, equal, number = re.sub(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", name, guard).partition(" == ")
        sizes = {variable: dynamic.get(given, {}).get(axis) for variable, (given, axis) in axes.items()}
        varying = sorted({size for size in sizes.values() if size is not None})
        if not equal or not number.isdecimal() or " % " in left or not varying or None in sizes.values():
            continue
        with contextlib.suppress(IsthmusError):  # what this grammar lacks is no product of sizes
            for ends in itertools.product(*((ranges[size].min, ranges[size].max) for size in varying)):
                chosen = dict(zip(varying, ends, strict=True))
                if expressions.evaluate(left, {variable: chosen[str(size)] for variable, size in sizes.items()}) != int(number):
                    readable = re.sub(r"size_(\w+)_(\d+)\b", r"\1.shape[\2]", left)
                    places = [f"{given}:{axis}" for given, axis in axes.values()]
                    yield Reason(
                        f"it computes only with {readable} == {number}, as in the example",
                        where=", ".join(dict.fromkeys(given for given, _ in axes.values())),
                        fix=f"leave out --dynamic for {' and '.join(places)}, or compute what has {number} entries from the input's size",
                    )
                    break


def dimension_names(
    program: torch.export.ExportedProgram, dynamic: Mapping[str, Mapping[int, str]], inputs: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Maps torch's symbols (`s20`) to the named sizes (`batch`) that stand on the same input axes."""
    names: dict[str, str] = {}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for user_input, (name, _) in zip(program.graph_signature.user_inputs, inputs.items(), strict=True):
        for axis, size in dynamic.get(name, {}).items():
            names.setdefault(str(placeholders[str(user_input)].meta["val"].shape[axis]), size)
    return names


def input_shapes(program: torch.export.ExportedProgram, names: Mapping[str, str]) -> list[tuple[int | str, ...]]:
    """The shape of each input; a size that varies is a named size, or an expression of torch's symbols."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return [_shape(values[str(name)], names) for name in program.graph_signature.user_inputs]


def output_shapes(program: torch.export.ExportedProgram, names: Mapping[str, str]) -> list[tuple[int | str, ...]]:
    """The shape of each output that is a tensor; see `input_shapes`."""
    import torch

    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    found = (values.get(str(name)) for name in program.graph_signature.user_outputs)
    return [_shape(value, names) for value in found if isinstance(value, torch.Tensor)]


def _shape(value: torch.Tensor, names: Mapping[str, str]) -> tuple[int | str, ...]:
    symbol = re.compile(r"\bs\d+\b")
    return tuple(d if isinstance(d, int) else symbol.sub(lambda m: names.get(m[0], m[0]), str(d)) for d in value.shape)


def _bad_axes(
    inputs: Mapping[str, torch.Tensor], dynamic: Mapping[str, Mapping[int, str]], ranges: Mapping[str, SizeRange]
) -> list[Reason]:
    reasons = []
    for name, axes in dynamic.items():
        if name not in inputs:
            reasons.append(Reason(f"no such input; the inputs are {', '.join(inputs)}", where=name))
            continue
        shape = inputs[name].shape
        for axis, size in axes.items():
            if not 0 <= axis < len(shape):
                reasons.append(Reason(f"axis {axis} does not exist, the shape is {tuple(shape)}", where=name))
            elif shape[axis] < 2:
                reasons.append(
                    Reason(
                        f"axis {axis} is dynamic and has the example size {shape[axis]}",
                        where=name,
                        fix="give an example of size 2 or more",
                    )
                )
            elif not ranges[size].min <= shape[axis] <= ranges[size].max:
                got, r = shape[axis], ranges[size]
                reasons.append(Reason(f"axis {axis} has the example size {got}, outside its range {r.min} to {r.max}", where=name))
    return reasons


def _dimensions(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
    ranges: Mapping[str, SizeRange],
    named: bool,
) -> Any:
    from torch.export import Dim

    if not dynamic:
        return None
    dims = {size: Dim(size, min=r.min, max=r.max) for size, r in ranges.items()} if named else {}
    shapes = tuple(
        {
            axis: dims[size] if named else Dim.DYNAMIC(min=ranges[size].min, max=ranges[size].max)
            for axis, size in dynamic.get(name, {}).items()
        }
        for name in inputs
    )
    # torch.export wants the structure of the signature: what `*args` takes is one tuple.
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        return (*shapes[:first], shapes[first:])
    return shapes


def _reason(error: Exception) -> Reason:
    import torch

    # The innermost frame outside torch is the user's line that could not be captured.
    ours = Path(__file__).parent
    library = Path(torch.__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not Path(frame.filename).is_relative_to(library)
        and not Path(frame.filename).is_relative_to(ours)
        and Path(frame.filename).is_file()
    ]
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    where = ""
    if frames:
        frame = frames[-1]
        line = linecache.getline(frame.filename, frame.lineno or 0).strip()
        where = f"{frame.filename}:{frame.lineno} ({line})"
    return Reason(f"{type(error).__name__}: {first_line}", where=where)


def _unique(reasons: Any) -> list[Reason]:
    return list(dict.fromkeys(reasons))
