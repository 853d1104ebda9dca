"""`python -m isthmus.targets.coreai.conversion_child REQUEST`: writes an asset, in a process that the converter may end.

The request is a JSON file: `{"program": FILE, "inputs": [NAME, …], "outputs": [NAME, …], "asset": FOLDER, "description": TEXT}`, whose
program was written by `torch.export.save`, in operators that coreai-torch converts (see `prepare`). What is printed is one JSON object:
`{"operators": {NAME: COUNT}}`, or `{"error": TEXT}`.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ...exporter.ops.coreai_table import coreai_torch
from ...exporter.quiet import quiet
from .child import text_of
from .products import operations

_WEIGHT = 128
"""Elements from which a tensor is stored under a name of ours."""


def main(arguments: list[str]) -> int:
    """Converts one program; see the module's docstring."""
    # What the library prints must not come before the answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        request = json.loads(Path(arguments[0]).read_text("utf-8"))
        converted = program_of(torch.export.load(request["program"]), request["inputs"], request["outputs"])
        counts = collections.Counter(operation.name for operation in operations(converted))
        save(converted, Path(request["asset"]), request["description"])
    except Exception as error:  # the library raises what it likes
        print(json.dumps({"error": text_of(error)}), file=answers, flush=True)
        return 1
    print(json.dumps({"operators": counts}), file=answers, flush=True)
    return 0


def program_of(program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]) -> Any:
    """Converts a program, without chatter; equal programs give equal ones in every process.

    Args:
        program: In operators that coreai-torch converts; see `prepare`. It is changed.
        input_names: The names of its inputs, in order.
        output_names: The names of its outputs, in order.

    Returns:
        A `coreai.authoring.AIProgram`.

    Raises:
        Exception: What coreai-torch raises for a program that it cannot convert.
    """
    _make_outputs_distinct(program)
    _leave_whole(program.graph_module)
    library = coreai_torch()
    _list_results()
    with quiet("coreai_torch"):
        converter = _converter(library)
        converter.add_exported_program(program, input_names=input_names, output_names=output_names)
        converted = converter.to_coreai()
    _name_graphs(converted)
    return converted


def save(converted: Any, path: Path, description: str) -> Any:
    """Writes an asset without the time at which it was written.

    Args:
        converted: From `program_of`.
        path: A folder that does not exist, `*.aimodel`.
        description: One sentence, shown by Xcode.

    Returns:
        The `coreai.authoring.AIModelAsset`.
    """
    asset = converted.save_asset(path)

    def describe(metadata: Any) -> None:
        metadata.creation_date = 0.0
        metadata.model_description = description

    asset.update_metadata(describe)
    metadata = path / "metadata.json"  # whose keys come in any order
    metadata.write_text(json.dumps(json.loads(metadata.read_text("utf-8")), indent=2, sort_keys=True) + "\n", "utf-8")
    return asset


def _converter(library: Any) -> Any:
    """A converter that names weights by their order: coreai-core 1.0.0b3 names them by where the process lies in memory."""
    from coreai._compiler.dialects import coreai
    from coreai._compiler.ir import DenseResourceElementsAttr
    from coreai_torch._utils import get_tensor_type

    class Converter(library.TorchConverter):  # type: ignore[misc]  # untyped
        weights = 0

        def _constant_from_tensor(self, tensor: torch.Tensor) -> Any:
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.numel() < _WEIGHT or tensor.dtype not in _STORED:
                return super()._constant_from_tensor(tensor)
            array: Any = tensor.detach().cpu().contiguous().numpy()
            self.weights += 1
            stored = DenseResourceElementsAttr.get_from_buffer(array, f"weight_{self.weights}", get_tensor_type(tensor, self._location))
            constant: Any = coreai.ConstantOp
            return constant(value=stored).result

    return Converter(mode=library.TorchConverter.Mode.RELEASE)


@functools.cache
def _list_results() -> None:
    """Lets converters give lists of results: inside of conditions and loops coreai-torch 0.4.3 takes an `OpResultList` (of a normalisation,
    of a maximum along an axis) for a single result, and fails with "'OpResultList' object has no attribute 'type'".
    """
    from coreai._compiler.ir import OpResultList
    from coreai_torch import _aten_to_core

    several: Any = OpResultList

    def listing(convert: Any) -> Any:
        @functools.wraps(convert)
        def converted(*arguments: Any, **keywords: Any) -> Any:
            results: Any = convert(*arguments, **keywords)
            return list(results) if isinstance(results, several) else results

        return converted

    table = _aten_to_core._aten_to_core_resolver
    table.update({name: listing(convert) for name, convert in table.items()})


_STORED = (torch.float32, torch.float16, torch.int32, torch.int8)


def _name_graphs(converted: Any) -> None:
    """Numbers the graphs that composite operators are, whose names end in random letters."""
    from coreai._compiler.ir import Attribute, StringAttr

    names: dict[str, str] = {}
    found = list(operations(converted))
    with converted._module._mlir_module.context:
        for operation in found:
            if operation.name == "coreai.graph" and "composite_decl" in operation.attributes:
                name = operation.attributes["sym_name"].value
                names[name] = f"{name.rpartition('_')[0] or name}_{len(names)}"
                operation.attributes["sym_name"] = StringAttr.get(names[name])
        for operation in found:
            if operation.name == "coreai.invoke":
                callee = str(operation.attributes["callee"])
                renamed = re.sub(r"@(\w+)", lambda match: f"@{names.get(match[1], match[1])}", callee)
                operation.attributes["callee"] = Attribute.parse(renamed)


def _leave_whole(module: GraphModule) -> None:
    """Linear layers of sequences inside of conditions and loops become batched products: coreai-core 1.0.0b3 ends the process ("Non tensor
    operand was passed to NDArray.alloc") where a branch has several whose batch and length, both dynamic, torch has made one axis.

    Given, in a branch::

        view = aten.view(x, [batch * length, 16])
        addmm = aten.addmm(bias, view, weight)
        again = aten.view(addmm, [batch, length, 2, 8])

    Result::

        expand = aten.expand(weight, [batch, 16, 16])
        bmm = aten.bmm(x, expand)
        add = aten.add(bmm, bias)
        again = aten.view(add, [batch, length, 2, 8])

    Args:
        module: The outermost graph, which is not changed itself.
    """
    aten = torch.ops.aten
    inner = [found for found in module.modules() if isinstance(found, GraphModule) and found is not module]
    for branch in inner:
        for node in list(branch.graph.nodes):
            if node.target not in (aten.addmm.default, aten.mm.default) or node.kwargs:
                continue
            arguments: Any = node.args
            *bias, view, weight = arguments
            if not (isinstance(view, Node) and view.target is aten.view.default and _flattens(view)):
                continue
            if any(user.target is not aten.view.default for user in node.users):
                continue
            source = view.args[0]
            with branch.graph.inserting_before(node):
                batch = _call(branch, aten.sym_size.int, source, 0)
                weights = _call(branch, aten.expand.default, weight, [batch, *weight.meta["val"].shape])
                whole = _call(branch, aten.bmm.default, source, weights)
                if bias:
                    whole = _call(branch, aten.add.Tensor, whole, *bias)
            node.replace_all_uses_with(whole)
            branch.graph.erase_node(node)
        branch.graph.eliminate_dead_code()
        branch.recompile()


def _call(module: GraphModule, target: Any, *arguments: Any) -> Node:
    made = module.graph.call_function(target, arguments)
    made.meta = {"val": target(*torch.fx.node.map_arg(arguments, lambda node: node.meta["val"]))}
    return made


def _flattens(view: Node) -> bool:
    """Whether it makes one axis of the first two of (B, L, C), both dynamic."""
    source: Any = view.args[0]
    given, made = source.meta["val"], view.meta["val"]
    dynamic = [isinstance(n, torch.SymInt) for n in given.shape]
    return dynamic == [True, True, False] and made.dim() == 2 and made.shape[1] == given.shape[2]


def _make_outputs_distinct(program: ExportedProgram) -> None:
    """Outputs that are one node, an input or a weight become copies: coreai-torch 0.4.3 keeps outputs by the names of their nodes."""
    graph = program.graph
    (last,) = (node for node in graph.nodes if node.op == "output")
    outputs: list[Any] = []
    for node in last.args[0]:
        found = node
        if isinstance(node, Node) and (node in outputs or node.op == "placeholder"):
            with graph.inserting_before(last):
                found = graph.call_function(torch.ops.aten.clone.default, (node,))
            found.meta = dict(node.meta)
        outputs.append(found)
    last.args = (tuple(outputs),)
    for spec, node in zip(program.graph_signature.output_specs, outputs, strict=True):
        if isinstance(node, Node):
            spec.arg.name = node.name
    program.graph_module.recompile()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
