"""From a traced program to ONNX, as an `onnx_ir.Model`, and the checks that every written ONNX file has to pass.

`torch.onnx.export` is called without its optimiser: that deletes `x + eps` for eps <= 1e-8 (torch 2.13.0 with onnxscript 0.7.2), after
which diffusers' Sana and DC-AE export without an error and compute NaN. The passes of `exporter.passes` stand in its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import IsthmusError, Reason, UnsupportedError
from .op import DOMAIN
from .quiet import quiet

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

OPSETS = (23, 20, 21, 22, 24, 25)
"""The opsets that torch.onnx.export writes correctly, the default first. It returns 26 to 28 with an opset-18 header and newer operators,
and quietly turns 17 into 18. 23 is the first with Attention and RMSNormalization."""

EXTERNAL_DATA_BYTES = 2**30
"""Weights above this go to `model.onnx.data`. Protobuf itself ends at 2 GiB."""


def to_onnx(
    program: torch.export.ExportedProgram,
    *,
    opset: int,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dimension_names: Mapping[str, str] | None = None,
) -> ir.Model:
    """Translates a traced program. The initializers share memory with the program's weights.

    Calls of our own operators become nodes of our domain, each with a function body in the model (see `ops.onnx_forms`).

    Args:
        program: The traced program.
        opset: One of `OPSETS`.
        input_names: Names of the inputs, in order.
        output_names: Names of the outputs, in order.
        dimension_names: torch's symbols to readable names, from `trace.dimension_names`.

    Raises:
        UnsupportedError: Operators without an ONNX translation, all of them listed by name and module.
    """
    import torch

    from .ops.onnx_forms import add_functions
    from .ops.onnx_translation import translations

    constants = [
        Reason(f"output {i} is the Python value {spec.arg.value!r}", fix="wrap the module in one that returns tensors only")
        for i, spec in enumerate(program.graph_signature.output_specs)
        if isinstance(spec.arg, torch.export.graph_signature.ConstantArgument) and spec.arg.value is not None
    ]
    if constants:
        raise UnsupportedError("an exported graph has tensors as outputs", reasons=constants)
    try:
        with quiet("torch.onnx"):
            result = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=opset,
                # Names that no parameter has: torch would let an input replace the parameter of its name.
                input_names=[f"isthmus::input::{i}" for i in range(len(input_names))],
                verbose=False,
                custom_translation_table=translations(program),
            )
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedError(
            "torch.onnx.export does not translate this program",
            reasons=_untranslated(program, error),
            hint="replace these operators by ones that ONNX has, or by several",
        ) from error
    assert result is not None
    model = result.model
    got = model.opset_imports.get("")
    if got != opset:
        raise IsthmusError(
            f"torch.onnx.export wrote opset {got}, expected {opset}", hint=f"choose one of {', '.join(map(str, OPSETS))} with --opset"
        )
    _name(model, input_names, output_names)
    _tell_apart(model)
    _rename_dimensions(model, dimension_names or {})
    add_functions(model)
    return model


def _tell_apart(model: ir.Model) -> None:
    """Renames results that have the name of a weight: torch gives a buffer called `cos` and the result of a cosine one name."""
    weights = set(model.graph.initializers)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in weights and not value.is_graph_output():
                value.name = f"{value.name}/result"


def _name(model: ir.Model, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Names inputs and outputs. An output that is an input, a weight or another output as well gets an Identity of its own."""
    import onnx_ir as ir

    graph = model.graph
    if len(graph.inputs) != len(input_names) or len(graph.outputs) != len(output_names):
        raise IsthmusError(
            f"torch.onnx.export wrote {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, "
            f"expected {len(input_names)} and {len(output_names)}",
            hint="wrap the module in one that takes and returns tensors only",
        )
    own: set[ir.Value] = set()
    for i, value in enumerate(graph.outputs):
        if value.producer() is None or value in own:
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[i] = node.outputs[0]
        own.add(graph.outputs[i])
    wanted = {*input_names, *output_names}
    clashing = [v for v in graph.initializers.values() if v.name in wanted]
    ir.convenience.rename_values(clashing, [f"{v.name}.parameter" for v in clashing])
    for node in graph:
        for value in node.outputs:
            if value.name in wanted and value not in own:
                value.name = f"{value.name}.value"
    for value, name in (*zip(graph.inputs, input_names, strict=True), *zip(graph.outputs, output_names, strict=True)):
        value.name = name


def save(model: ir.Model, path: Path, *, bytes_of_weights: int) -> None:
    """Writes `model` to `path`, one tensor at a time; weights above `EXTERNAL_DATA_BYTES` go to `path` + `.data` beside it."""
    import onnx_ir as ir

    external = f"{path.name}.data" if bytes_of_weights > EXTERNAL_DATA_BYTES else None
    # One worker and a small window: parallel writers would hold that many converted copies of large weights at once.
    ir.save(model, path, external_data=external, max_workers=1, max_in_flight_bytes=256 * 2**20)


def check(path: Path, *, opset: int) -> None:
    """Checks a written file: the opset asked for, and `onnx.checker` with full shape and type inference.

    Raises:
        IsthmusError: The file is not valid ONNX of that opset.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    got = {entry.domain: entry.version for entry in model.opset_import}
    if got.get("") != opset:
        raise IsthmusError(f"{path.name} has opset {got.get('')}, expected {opset}")
    del model
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise IsthmusError(f"{path.name} is not valid ONNX: {error}", hint="this is a bug in the export; please report it") from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _untranslated(program: torch.export.ExportedProgram, error: BaseException) -> list[Reason]:
    """Every operator of the program that torch.onnx cannot translate, not only the first that stopped it; else what stopped it.

    Dispatching node by node needs torch's internal registry; torch 2.13 offers no public way to ask.
    """
    from torch.onnx._internal.exporter import _decomp, _dispatching, _registration

    reasons: dict[str, Reason] = {}
    with quiet("torch.onnx"):
        registry = _registration.ONNXRegistry.from_torchlib()
        table = _decomp.create_onnx_friendly_decomposition_table(set(_decomp.get_onnx_implemented_overloads(registry)))
        try:
            nodes = list(program.run_decompositions(table).graph.nodes)
        except Exception as failure:  # whatever stops the decomposition is what stopped the export
            return [Reason(_innermost(failure))]
        for node in nodes:
            # torch.onnx drops assertions before it translates.
            if node.op != "call_function" or str(node.target) in reasons or "assert" in str(node.target):
                continue
            if not hasattr(node.target, "_schema") or node.target.namespace == DOMAIN:
                continue
            function, message = _dispatching.dispatch(node, registry)
            if function is None:
                scope = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
                where = scope[-1] if scope else ""
                reasons[str(node.target)] = Reason(f"{node.target} has no ONNX translation ({message})", where=where)
    return list(reasons.values()) or [Reason(_innermost(error))]


def _rename_dimensions(model: ir.Model, names: Mapping[str, str]) -> None:
    import onnx_ir as ir

    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def rename(value: ir.Value | None) -> None:
        if value is None or value.shape is None:
            return
        dims = [
            pattern.sub(lambda m: names[m[0]], dim.value) if isinstance(dim, ir.SymbolicDim) and dim.value is not None else dim
            for dim in value.shape
        ]
        value.shape = ir.Shape(dims)

    for value in model.graph.inputs:
        rename(value)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            rename(value)
