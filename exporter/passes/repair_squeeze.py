"""Squeeze that names a dimension which is not 1: PyTorch leaves such a dimension alone, ONNX calls it an error.

`x.squeeze(d)` is exported as `Squeeze(x, [d])` whatever the size of `d` (measured with torch 2.13, opsets 20 to 25), and only
`onnx.checker.check_model(full_check=True)` finds it.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from ._rewrite import dims, input_at, ints, is_op, new_constant, replace, scopes

_RANGES = "pkg.torch.export.ExportedProgram.range_constraints"


class RepairSqueeze(ir.passes.InPlacePass):
    """Drops from a Squeeze the axes whose size is known not to be 1; without any axis left it goes.

    Given::

        f (float[2, 5, 8] x) => (float[2, 5, 8] z) {
            axes = Constant <value_ints: ints = [1]> ()
            y = Squeeze (x, axes)
            z = Relu (y)
        }

    Result::

        f (float[2, 5, 8] x) => (float[2, 5, 8] z) {
            z = Relu (x)
        }

    A symbolic size counts as not 1 when its range in the exported program excludes 1, or when the exporter's own annotation of the
    output keeps the dimension. It must therefore run before shape inference, which would annotate the output as ONNX reads the node,
    and before RecordScopes, which removes the ranges.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        never_one = _symbols_that_are_never_one(model.graph.metadata_props.get(_RANGES, ""))
        for scope in scopes(model):
            for node in scope.graph:
                if not is_op(node, "Squeeze"):
                    continue
                source, axes = node.inputs[0], ints(input_at(node, 1))
                shape, out = dims(source), dims(node.outputs[0])
                if source is None or shape is None or not axes:
                    continue
                kept = [axis for axis in axes if not _is_not_one(shape[axis], never_one)]
                # The exporter's annotation has as many dimensions as PyTorch's result: none left out means that none was 1.
                if out is not None and len(out) == len(shape):
                    kept = []
                if len(kept) == len(axes):
                    continue
                if kept:
                    node.replace_input_with(1, new_constant(scope, node, np.array(kept, dtype=np.int64)))
                elif replace(node.outputs[0], source):
                    scope.graph.remove(node, safe=True)
                else:  # the graph's output must stay a value of its own
                    node.op_type = "Identity"
                    node.resize_inputs(1)
                modified = True
        return ir.passes.PassResult(model, modified)


def _is_not_one(size: int | str | None, never_one: set[str]) -> bool:
    return size != 1 if isinstance(size, int) else size in never_one


def _symbols_that_are_never_one(text: str) -> set[str]:
    """Reads torch.export's ranges as recorded by the exporter: `{s20: VR[2, 8], s7: VR[1, int_oo]}`."""
    return {name for name, low in re.findall(r"(\w+): VR\[(\d+),", text) if int(low) > 1}
