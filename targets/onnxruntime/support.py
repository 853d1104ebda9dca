"""What ONNX Runtime cannot take, said before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...exporter.errors import Reason, UnsupportedError
from ...exporter.ops.onnx_forms import custom_nodes, forms
from ...exporter.passes import module_of
from ...exporter.passes._rewrite import dims
from ...exporter.passes.convert_opset import unconvertible
from ...exporter.passes.quantize_int4 import OPSET as INT4_OPSET
from ...exporter.passes.to_standard_operators import OPSET, standard_body

if TYPE_CHECKING:
    import onnx_ir as ir


_DOMAINS = ("", "com.microsoft")

# ONNX Runtime 1.32 parses these types and has no CPU kernels for arithmetic on them.
_NO_ARITHMETIC = ("BFLOAT16", "COMPLEX64", "COMPLEX128", "FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ")
_MOVES_ONLY = ("Cast", "QuantizeLinear", "DequantizeLinear", "Identity", "Constant", "Reshape", "Transpose", "Squeeze", "Unsqueeze")


_LAYERS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention")


def unsupported(model: ir.Model) -> list[Reason]:
    """Every reason why ONNX Runtime, or this lowering, cannot take `model`, by operator and PyTorch module; repeated reasons are merged.

    Layers that compute in float64 or float16 are among them: the lowering starts from float32, and an artifact called fp16 whose layers
    are float64 would be a false label.
    """
    import onnx_ir as ir

    functions = {(f.domain, f.name) for f in model.functions.values()}
    reasons: dict[Reason, None] = {}
    inside = [node for f in model.functions.values() for node in ir.traversal.RecursiveGraphIterator(f.graph)]
    for node in (*ir.traversal.RecursiveGraphIterator(model.graph), *inside):
        where = module_of(node)
        if node.domain not in _DOMAINS and (node.domain, node.op_type) not in functions:
            reasons[
                Reason(
                    f"operator {node.domain}::{node.op_type} has neither a kernel nor a function body in the file",
                    where,
                    "add a function body",
                )
            ] = None
        for value in node.outputs:
            if value.dtype is not None and value.dtype.name in _NO_ARITHMETIC and node.op_type not in _MOVES_ONLY:
                reasons[
                    Reason(
                        f"{node.op_type} computes in {value.dtype.name.lower()}, for which ONNX Runtime's CPU has no kernel",
                        where,
                        "use float32",
                    )
                ] = None
            if node.op_type in _LAYERS and value.dtype is not None and value.dtype.name in ("DOUBLE", "FLOAT16"):
                what = f"{node.op_type} computes in {value.dtype.name.lower()}, expected float32 before the lowering"
                reasons[Reason(what, where, "export the module in float32 (module.float()), with float32 inputs")] = None
    return list(reasons)


def too_old(model: ir.Model) -> list[Reason]:
    """Why a graph cannot have INT4 weights; empty when it can."""
    found = model.opset_imports[""]
    if found >= INT4_OPSET:
        return []
    return [Reason(f"INT4 weights in blocks are of opset {INT4_OPSET}, got {found}", fix=f"--opset {INT4_OPSET} or later")]


def without_standard_operator(model: ir.Model) -> list[Reason]:
    """Why the model cannot be written with the standard's LinearAttention and CausalConvWithState; empty when it can, or need not be."""
    nodes = custom_nodes(model)
    reasons: dict[Reason, None] = {}
    for node in nodes:
        op, _ = forms()[node.op_type]
        where = module_of(node)
        if "onnx27" in op.lacks:
            fix = "choose --ssm-op plugin or decomposed"
            reasons[Reason(f"{op.name} has no standard operator in opset {OPSET}: {op.lacks['onnx27']}", where, fix)] = None
            continue
        if node.op_type == "CausalConv1d" and not isinstance((dims(node.inputs[0]) or [None] * 3)[1], int):
            # ONNX Runtime 1.32 has no kernel for the operator; it runs the body that the standard derives from the number of channels.
            fix = "make the number of channels static, or choose --ssm-op plugin or decomposed"
            reasons[Reason("ONNX Runtime runs CausalConvWithState for a static number of channels only", where, fix)] = None
        try:
            standard_body(node)
        except UnsupportedError as error:
            reasons.update(dict.fromkeys(error.reasons))
    return [*reasons, *(unconvertible(model, OPSET) if nodes else [])]
