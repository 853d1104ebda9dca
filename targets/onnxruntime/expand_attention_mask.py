"""Gives every Attention mask the full query axis, which ONNX Runtime's CPU kernel asks for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class ExpandAttentionMask(ir.passes.InPlacePass):
    """Expands a mask that broadcasts over the queries.

    ONNX allows any mask that broadcasts to (batch, heads, queries, keys). ONNX Runtime's CPU kernel (1.24 to 1.32) broadcasts batch and
    heads only, and fails at run time with "inconsistent q_sequence_length (between attn_mask and Q)". Drop this pass when it broadcasts.

    Given::

        y = Attention(q, k, v, mask)                 # q: (B, H, S, D), mask: (B, 1, 1, L)

    Result::

        full = Expand(mask, [1, 1, S, 1])            # S from Shape(q) where it is dynamic
        y = Attention(q, k, v, full)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph and its subgraphs; a mask whose query axis is known to be full stays as it is."""
        modified = False
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "Attention" or node.domain != "" or len(node.inputs) < 4 or node.inputs[3] is None:
                continue
            query, mask = node.inputs[0], node.inputs[3]
            assert query is not None
            if mask.shape is None or query.shape is None or len(query.shape) != 4:
                continue
            queries = query.shape[2]
            if len(mask.shape) > 1 and mask.shape[-2] == queries:
                continue
            graph = node.graph
            assert graph is not None
            nodes = _shape(query, queries, node)
            shape = nodes[-1].outputs[0]
            expand = ir.node("Expand", [mask, shape], name=f"{node.name}/mask")
            expand.outputs[0].name = f"{node.outputs[0].name}/mask"
            expand.outputs[0].type = mask.type
            expand.outputs[0].shape = ir.Shape([*(mask.shape[:-2] if len(mask.shape) == 4 else (1, 1)), queries, mask.shape[-1]])
            for new in (*nodes, expand):
                new.metadata_props.update(node.metadata_props)
                graph.insert_before(node, new)
            node.replace_input_with(3, expand.outputs[0])
            modified = True
        return ir.passes.PassResult(model, modified)


def _shape(query: ir.Value, queries: int | ir.SymbolicDim, node: ir.Node) -> list[ir.Node]:
    """Nodes whose last one gives the int64 vector [1, 1, S, 1]."""

    def constant(values: list[int], suffix: str) -> ir.Node:
        made = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(values, np.int64))}, name=f"{node.name}/mask_{suffix}")
        made.outputs[0].name = f"{node.outputs[0].name}/mask_{suffix}"
        made.outputs[0].dtype, made.outputs[0].shape = ir.DataType.INT64, ir.Shape([len(values)])
        return made

    if isinstance(queries, int):
        return [constant([1, 1, queries, 1], "shape")]
    before, after = constant([1, 1], "before"), constant([1], "after")
    size = ir.node("Shape", [query], attributes={"start": 2, "end": 3}, name=f"{node.name}/mask_queries")
    joined = ir.node(
        "Concat", [before.outputs[0], size.outputs[0], after.outputs[0]], attributes={"axis": 0}, name=f"{node.name}/mask_shape"
    )
    for made, length in ((size, 1), (joined, 4)):
        made.outputs[0].name = made.name
        made.outputs[0].dtype, made.outputs[0].shape = ir.DataType.INT64, ir.Shape([length])
    return [before, after, size, joined]
