"""Makes a bfloat16 graph computable where there are no bfloat16 kernels, with the same rounding: ONNX Runtime's CPU, above all."""

from __future__ import annotations

import onnx_ir as ir

_BF16, _F32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


class WidenBfloat16(ir.passes.InPlacePass):
    """Computes every bfloat16 node in float32, and rounds its results to bfloat16.

    That is what hardware does that accumulates in float32: every value of the graph stays a bfloat16 number, and only what is inside a node
    is computed more exactly. ONNX Runtime 1.32 has no bfloat16 kernels on the CPU but for casts; to be dropped when it has.

    Given, x in bfloat16::

        y = MatMul(x, w)

    Result::

        x_f32 = Cast<to=FLOAT>(x)
        w_f32 = Cast<to=FLOAT>(w)
        y_f32 = MatMul(x_f32, w_f32)
        y = Cast<to=BFLOAT16>(y_f32)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph and the bodies in it, in place. Functions take either type and stay."""
        modified = False
        for graph in (model.graph, *model.graph.subgraphs()):
            wide: dict[ir.Value, ir.Value] = {}
            for node in list(graph):
                if node.op_type != "Cast" or node.domain:
                    modified |= _widen(node, graph, wide)
        return ir.passes.PassResult(model, modified)


def _widen(node: ir.Node, graph: ir.Graph, wide: dict[ir.Value, ir.Value]) -> bool:
    modified = False
    for i, value in enumerate(node.inputs):
        if value is None or value.dtype != _BF16:
            continue
        if value not in wide:
            cast = _cast(value, _F32, f"{value.name}.widened", node)
            graph.insert_before(node, cast)
            wide[value] = cast.outputs[0]
        node.replace_input_with(i, wide[value])
        modified = True
    for value in node.outputs:
        if value.dtype != _BF16:
            continue
        name = value.name
        value.name, value.type = f"{name}.unrounded", ir.TensorType(_F32)
        cast = _cast(value, _BF16, name or "", node)
        rounded = cast.outputs[0]
        value.replace_all_uses_with(rounded, replace_graph_outputs=True)
        cast.replace_input_with(0, value)
        graph.insert_after(node, cast)
        modified = True
    return modified


def _cast(value: ir.Value, to: ir.DataType, name: str, like: ir.Node) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(to)}, name=f"{name}/cast")
    node.metadata_props.update(like.metadata_props)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(to), value.shape
    return node
