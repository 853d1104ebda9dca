"""Attention, which stays one operation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....exporter.masked_attention import guarded_attention
from . import applied, decomposition

if TYPE_CHECKING:
    from torch.export import ExportedProgram

aten = torch.ops.aten


@decomposition(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """As coremltools drops `enable_gqa`: heads of keys and values that several of the queries share are repeated."""
    if not enable_gqa or query.shape[-3] == key.shape[-3] == value.shape[-3]:
        return NotImplemented
    key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


def guarded(program: ExportedProgram) -> ExportedProgram:
    """The program with zeros for queries that may read no key, which are not a number in Core ML; see `guarded_attention`.

    Args:
        program: What `decomposed` gave, whose masks the layout of the Neural Engine has not put in order.

    Returns:
        A new program that shares its weights; the given one where no attention has a mask.
    """
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    calls = [node for graph in graphs for node in graph.nodes if node.target == aten.scaled_dot_product_attention.default]
    if all(_mask(node) is None for node in calls):
        return program
    return applied(program, {aten.scaled_dot_product_attention.default: guarded_attention})


def _mask(node: torch.fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
