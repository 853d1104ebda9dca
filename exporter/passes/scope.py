"""Where a node comes from: its PyTorch module and the call inside it, read from what torch.onnx.export records.

Given::

    node.metadata_props = {
        "namespace": ": Net/blocks.0.attn.qkv: torch.nn.modules.linear.Linear/linear_1: aten.linear.default",
        "pkg.torch.onnx.class_hierarchy": "['Net', 'torch.nn.modules.linear.Linear', 'aten.linear.default']",
        "pkg.torch.onnx.name_scopes": "['', 'blocks.0.attn.qkv', 'linear_1']",
        "pkg.torch.onnx.fx_node": "%linear_1 : ...", "pkg.torch.onnx.stack_trace": 'File "/home/someone/net.py", line 7, ...'}

Result::

    node.metadata_props = {"isthmus.module": "blocks.0.attn.qkv", "isthmus.operator": "linear"}

The stack traces go because they carry file paths of the machine that exported, and because they are most of the graph's bytes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

import onnx_ir as ir

from ._rewrite import ORIGIN, scopes

MODULE = "isthmus.module"
OPERATOR = "isthmus.operator"

_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # what torch writes for calls outside every module, e.g. sym_size
_BULKY = ("pkg.torch.", "pkg.onnxscript.", "namespace")


@dataclass(frozen=True)
class Origin:
    """The call that a node was made for.

    Attributes:
        module: The PyTorch module path, e.g. `blocks.0.attn.qkv`; empty for the root.
        operator: The operator in short, e.g. `linear`.
        call: torch.export's own name for this one call, e.g. `linear_1`.
    """

    module: str
    operator: str
    call: str


def module_of(node: ir.Node) -> str:
    """The PyTorch module path of a node, e.g. `blocks.0.attn.qkv`; empty for the root and for nodes of unknown origin."""
    module = node.metadata_props.get(MODULE)
    if module is not None:
        return module
    origin = _read(node)
    return origin.module if origin is not None else ""


def operator_of(node: ir.Node) -> str:
    """The PyTorch operator of a node in short, e.g. `linear` for the MatMul of a Linear; its ONNX operator when that is not known."""
    return node.metadata_props.get(OPERATOR) or node.op_type


class RecordScopes(ir.passes.InPlacePass):
    """Keeps the module and the operator of every node, and removes the rest of the exporter's metadata. See the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = _strip(model.metadata_props)
        for function in model.functions.values():
            modified |= _strip(function.metadata_props)
        for scope in scopes(model):
            graph = scope.graph
            modified |= _strip(graph.metadata_props)
            for value in (*graph.inputs, *graph.initializers.values()):
                modified |= _strip(value.metadata_props)
                if value.const_value is not None:
                    _strip(value.const_value.metadata_props)
            for node in graph:
                origin = _read(node)
                modified |= _strip(node.metadata_props)
                if node.doc_string:
                    node.doc_string, modified = None, True
                for value in node.outputs:
                    modified |= _strip(value.metadata_props)
                if origin is not None:
                    node.metadata_props[MODULE] = origin.module
                    node.metadata_props[OPERATOR] = origin.operator
                    node.meta[ORIGIN] = origin
                    modified = True
        return ir.passes.PassResult(model, modified)


def _strip(metadata: MutableMapping[str, str]) -> bool:
    bulky = [key for key in metadata if key.startswith(_BULKY)]
    for key in bulky:
        del metadata[key]
    return bool(bulky)


def _read(node: ir.Node) -> Origin | None:
    names, classes = (_strings(node.metadata_props.get(key)) for key in (_NAME_SCOPES, _CLASSES))
    if not names or not classes:
        return None
    module = names[-2] if len(names) > 1 else ""
    # A module that is called again gets its path with "@1", "@2", … added.
    module = "" if module == _NO_MODULE else re.sub(r"@\d+", "", module)
    return Origin(module, _short(classes[-1]), names[-1])


def _strings(text: str | None) -> list[str]:
    if not text:
        return []
    try:
        parsed = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in parsed] if isinstance(parsed, list | tuple) else []


def _short(target: str) -> str:
    # "aten.linear.default" -> "linear"; "isthmus.selective_scan.default" -> "selective_scan"; "<built-in function getitem>" -> "getitem"
    built_in = re.fullmatch(r"<.* (\w+)>", target)
    if built_in:
        return built_in.group(1)
    parts = target.split(".")
    return parts[1] if len(parts) == 3 else parts[-1]
