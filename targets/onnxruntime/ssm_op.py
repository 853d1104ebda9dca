"""How our own operators are written in the file: `--ssm-op`."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from ...exporter.ops.onnx_forms import add_functions, custom_nodes
from ...exporter.passes import optimise
from ...exporter.passes.convert_opset import ConvertOpset
from ...exporter.passes.inline_custom_operators import InlineCustomOperators
from ...exporter.passes.to_standard_operators import OPSET, ToStandardOperators

SsmOp = Literal["onnx27", "plugin", "decomposed"]


def write_ssm_op(model: ir.Model, ssm_op: SsmOp) -> list[str]:
    """Rewrites the nodes of our domain, in place.

    `plugin` leaves them and gives each a body of ONNX Runtime's own operators where those are right and faster than standard ones.

    Args:
        model: In its final precision.
        ssm_op: The option.

    Returns:
        Sentences for the report.

    Raises:
        UnsupportedError: `onnx27` cannot express the model; see `support.without_standard_operator`, which lists the reasons beforehand.
    """
    nodes = custom_nodes(model)
    if not nodes:
        return []
    if ssm_op == "plugin":
        add_functions(model, contrib=True)
        return [f"{len(nodes)} nodes of our own, each with a body in the file: any ONNX Runtime runs them, faster with our library"]
    if ssm_op == "onnx27":
        ConvertOpset(OPSET)(model)
        ToStandardOperators()(model)
        note = f"the file is of opset {OPSET}, with {len(nodes)} nodes of LinearAttention and CausalConvWithState"
    else:
        InlineCustomOperators()(model)
        note = f"{len(nodes)} operators of our own are written as plain standard operators"
    optimise(model, fuse=False)
    return [note]
