"""Equal constants and equal nodes, kept once."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from ._rewrite import MADE_BY_PASS, constant

_LIMIT = 4 << 20  # bytes: what FoldConstants makes at most, so that states of zeros are kept once


class MergeDuplicates(ir.passes.InPlacePass):
    """Merges constants of equal type, shape and bytes, and nodes of equal operator, inputs and attributes.

    Given::

        f (float[2, 3] x) => (float[2, 3] z) <int64[1] c = {1}, int64[1] d = {1}> {
            a = Unsqueeze (x, c)
            b = Unsqueeze (x, d)
            s = Add (a, b)
            z = Squeeze (s, c)
        }

    Result::

        f (float[2, 3] x) => (float[2, 3] z) <int64[1] c = {1}> {
            a = Unsqueeze (x, c)
            s = Add (a, a)
            z = Squeeze (s, c)
        }

    Only constants that a pass made are merged (so `c` and `d` above, lifted from Constant nodes): two parameters of the PyTorch module
    keep their two names even when their values are equal, since weights are loaded, quantised and reported by name. The comparison is of
    bytes: 0.0 is not -0.0. Equal nodes are found by onnx_ir's CommonSubexpressionEliminationPass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._nodes = CommonSubexpressionEliminationPass()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model in place."""
        modified = False
        seen: dict[tuple[object, ...], ir.Value] = {}
        for value in list(model.graph.initializers.values()):
            if MADE_BY_PASS not in value.meta or value.is_graph_output() or value.is_graph_input():
                continue
            array = constant(value, _LIMIT)
            if array is None:
                continue
            key = (value.dtype, array.shape, array.tobytes())
            first = seen.setdefault(key, value)
            if first is not value:
                value.replace_all_uses_with(first)
                del model.graph.initializers[value.name or ""]
                modified = True
        modified |= self._nodes(model).modified
        return ir.passes.PassResult(model, modified)
