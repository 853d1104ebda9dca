"""How mixtures of experts are written in the file: `--experts`."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...exporter.passes.fuse_experts import FuseExperts

Experts = Literal["fused", "dense"]


def write_experts(model: ir.Model, experts: Experts, provider: Literal["cpu", "cuda"]) -> list[str]:
    """Rewrites the mixtures of experts with constant weights, in place.

    With one thread, 8 experts of 512 by 1792 of which 2 are chosen, the operator takes 0.41 of the dense form's time for 256 tokens and
    0.28 for one, and 1.1 of it for 8 to 16 (benchmarks/experts.py). It is not written for CUDA, whose kernel is another: it was not run
    here, and ignored the activation's attributes until 1.28 (https://github.com/microsoft/onnxruntime/issues/28738).

    Args:
        model: In its final precision.
        experts: The option.
        provider: Where the file is to run.

    Returns:
        Sentences for the report.
    """
    fuse = FuseExperts()
    if experts == "dense" or provider != "cpu" or not fuse(model).modified:
        return []
    RemoveUnusedNodesPass()(model)
    mixtures = "1 mixture of experts is" if fuse.fused == 1 else f"{fuse.fused} mixtures of experts are"
    return [f"{mixtures} computed by com.microsoft.MoE, each expert for its own tokens: ONNX Runtime 1.23 or later, on the CPU"]
