"""From a PyTorch program to an ML Program, with the lowerings of our operators and of PyTorch's."""

from __future__ import annotations

import copy
import re
import traceback
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...exporter.errors import IsthmusError, Reason, UnsupportedError
from ...exporter.memory import settled
from ...exporter.op import OPS
from ...exporter.quiet import quiet
from . import control_flow
from .high_rank import low_rank
from .lowerings import WRONG_PASSES
from .modules import modules_text, number_modules
from .precision import compute_precision

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "fp16", "fp16-wide-scans")
"""How operations compute: in float32; in float16; in float16 but float32 inside the operators of ours (see `exporter.ops.mil`)."""


_WORDS = frozenset(
    "any bool program func tensor list dict tuple true false string bf16 fp16 fp32 fp64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "state".split()
)
"""What coremltools renames where a value is called so (coremltools 9.0, `NameSanitizer`)."""


_DECOMPOSED: weakref.WeakKeyDictionary[torch.export.ExportedProgram, torch.export.ExportedProgram] = weakref.WeakKeyDictionary()
"""What the check and the lowering of one program both need, and takes seconds; it shares the program's tensors."""


@dataclass(frozen=True)
class Converted:
    """A program that was converted.

    Attributes:
        model: A `coremltools.models.MLModel`, not loaded: on Linux nothing could run it.
        modules: For a package's metadata, the PyTorch module of each value; see `modules`.
    """

    model: Any
    modules: str


def convert(program: torch.export.ExportedProgram, precision: str, **options: Any) -> Any:
    """The model of `converted`, whose arguments it takes."""
    return converted(program, precision, **options).model


def converted(
    program: torch.export.ExportedProgram,
    precision: str,
    *,
    deployment_target: str = "iOS18",
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    shapes: Sequence[Sequence[tuple[int, ...]]] = (),
    wide: Collection[str] = (),
    masks_in_order: bool = False,
    passes: Sequence[str] | None = None,
) -> Converted:
    """Converts a program, without chatter.

    Inputs and outputs have PyTorch's dtypes, whatever the precision: float16 begins and ends inside. What Core ML lacks outside of a
    program, booleans and 64-bit integers, is int32. Buffers that the program changes become states, which Core ML keeps in float16.

    Args:
        program: From torch.export. It is decomposed no further than coremltools needs: attention stays one operation.
        precision: One of `PRECISIONS`.
        deployment_target: The oldest system that reads the package: `iOS16`, `iOS17`, `iOS18` or `iOS26`.
        input_names: The names of the inputs, in order (see `identifiers`); those of the program when empty.
        output_names: The same of the outputs; those that coremltools gives when empty.
        shapes: For each input the shapes that it takes, the usual one first, as many for each; empty for the shape of the program, or the
            range that its sizes have there.
        wide: Paths of PyTorch modules whose operations stay in float32 when the precision is float16.
        masks_in_order: The masks of attention are those of `layout`, which leave every query a key.
        passes: The names of coremltools' passes to run; its default ones when None.

    Raises:
        ValueError: The precision is none of these.
        UnsupportedError: A lowering refuses the program.
        IsthmusError: coremltools refuses the program; the message is its own, and names the operation where there is one.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"got precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    with quiet("coremltools"):
        import coremltools as ct
        from coremltools.converters.mil.converter import _reset_conversion_state

        from .lowerings.attention import guarded

        _register()
        ready, modules = _ready(decomposed(program) if masks_in_order else guarded(decomposed(program)))
        pipeline = ct.PassPipeline() if passes is None else ct.PassPipeline(list(passes), "chosen")
        pipeline.remove_passes(WRONG_PASSES)
        # coremltools 9.0 numbers what has no name throughout the process and begins anew after a conversion that succeeds alone: whatever
        # failed or was loaded before would be in the names, and equal programs would be other bytes. Drop it when it begins anew by itself.
        _reset_conversion_state()
        try:
            with settled():
                model = ct.convert(
                    ready,
                    inputs=_inputs(ready, input_names, shapes),
                    outputs=_outputs(ready, output_names),
                    minimum_deployment_target=getattr(ct.target, deployment_target),
                    skip_model_load=True,
                    compute_precision=compute_precision(precision, frozenset(wide), modules),
                    pass_pipeline=pipeline,
                )
        except Exception as error:
            # A conversion that fails leaves a temporary folder to the garbage collection of its frames, which warns of it.
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, IsthmusError):
                raise
            raise IsthmusError(
                f"coremltools cannot convert this program: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                hint="see --log-level debug for its own account; another form of the operation may convert",
            ) from error
        return Converted(model, modules_text(model._mil_program, modules))


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program in the operators that are lowered; see `lowerings.decomposed` and `high_rank`.

    Raises:
        UnsupportedError: torch cannot write it so.
    """
    from . import lowerings

    if (known := _DECOMPOSED.get(program)) is not None:
        return known
    try:
        result = low_rank(lowerings.decomposed(program))
    except Exception as error:  # torch raises what its layers raise, whole listings among it
        what = str(error).strip().partition("\n")[0]
        raise UnsupportedError(
            "torch cannot write this program without changes in place",
            reasons=[Reason(f"{type(error).__name__}: {what}")],
            hint="inside a branch or loop, return new tensors (x.clone()), and make constants buffers of the module",
        ) from error
    if result is not program:  # else the entry would keep itself
        _DECOMPOSED[program] = result
    return result


def identifiers(names: Sequence[str]) -> list[str]:
    """The names as Core ML takes them: letters, digits and `_` of ASCII, no word of MIL's, none twice. What fits already stays as it is."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_]", "_", name)
        plain = f"{plain}_" if plain in _WORDS else plain if re.match(r"[A-Za-z_]", plain) else f"_{plain}"
        taken = {*found, *(n for n in names if n != name)}
        found.append(next(n for n in (plain, *(f"{plain}_{i}" for i in range(1, len(names) + 1))) if n not in taken))
    return found


def _register() -> None:
    from .layout import operators
    from .lowerings import register

    register()
    control_flow.register()
    operators.register()
    for name in OPS:
        if OPS[name].has("coreml"):
            OPS[name].part("coreml")


def _ready(program: torch.export.ExportedProgram) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """A copy that coremltools reads, with branches and loops taken out and nodes numbered by module, and what the numbers stand for."""
    own = copy.copy(program)
    own._graph_module = copy.deepcopy(program.graph_module)  # the tensors are in the state dict, and shared
    for node, given in zip(own.graph.nodes, program.graph.nodes, strict=True):
        node.name = given.name  # a copied graph names an input `input_1` that is called as a function of Python's, `input`
    modules = number_modules(own)
    control_flow.take_out(own.graph_module)
    return own, modules


def _inputs(program: torch.export.ExportedProgram, names: Sequence[str], shapes: Sequence[Sequence[tuple[int, ...]]]) -> list[Any] | None:
    """How the package takes its inputs: under their names, and in the dtypes of `_outside`."""
    import coremltools as ct

    values = [value for _, value in user_inputs(program)]
    plain = identifiers(names) if names else [name for name, _ in user_inputs(program)]
    found = []
    for i, (name, value) in enumerate(zip(plain, values, strict=True)):
        given = shapes[i] if shapes else ()
        several = len(set(given)) > 1
        shape = ct.EnumeratedShapes(shapes=[list(s) for s in given], default=list(given[0])) if several else None
        found.append(ct.TensorType(name=name, shape=shape, dtype=_outside(value)))
    return found


def _outputs(program: torch.export.ExportedProgram, names: Sequence[str]) -> list[Any]:
    import coremltools as ct

    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    returned = [values.get(str(name)) for name in program.graph_signature.user_outputs]
    plain = identifiers(names) if names else [None] * len(returned)
    found = []
    for name, value in zip(plain, returned, strict=True):
        found.append(ct.TensorType(name=name, dtype=_outside(value)))
    return found


def _outside(value: Any) -> Any:
    """The dtype of an input or output in the package: float32, float16 where PyTorch has that, and int32 for all that is no float."""
    import numpy as np
    import torch

    if value is None or not value.dtype.is_floating_point:
        return np.int32
    return np.float16 if value.dtype == torch.float16 else np.float32


def user_inputs(program: torch.export.ExportedProgram) -> list[tuple[str, Any]]:
    """Name and value (a tensor without data) of each input, in order."""
    values: Mapping[str, Any] = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return [(str(name), values[str(name)]) for name in program.graph_signature.user_inputs]
