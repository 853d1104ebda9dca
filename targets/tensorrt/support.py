"""What TensorRT cannot take, said before anything is written. What costs speed or accuracy only is for `isthmus lint`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...exporter.errors import Reason
from ...exporter.op import DOMAIN
from ...exporter.ops.onnx_forms import custom_nodes
from ...exporter.passes import module_of
from ...exporter.passes._rewrite import attribute_int, constant, dims, input_at, is_op
from ...exporter.passes.write_attention import writable
from .options import FP8_CAPABILITIES, INT4_CAPABILITIES, RTXOptions, TensorRTOptions
from .recipe import profiles_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from ...exporter.target import Job

UNKNOWN_OPERATORS = frozenset(
    """AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress ConcatFromSequence
    ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix
    Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch
    SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss
    SplitToSequence StringConcat StringNormalizer StringSplit SwiGLU TfIdfVectorizer Unique""".split()
)
"""Operators of ONNX that the parser of TensorRT-RTX 1.7.1 says that it does not know (`OnnxParser.supports_operator`)."""

TOP_K_LIMIT = 3840
LOOP_LIMIT = 1024
"""Steps above which a Loop or Scan is refused: each step is a launch of every kernel in it, so that the GPU waits for the host."""

KERNELS = {"8.9": "sm_89", "9.0": "sm_90a", "12.0": "sm_120"}
"""The architectures of our own kernels, by the compute capability that they run on."""

_TYPES = frozenset({"COMPLEX64", "COMPLEX128", "DOUBLE", "STRING", "FLOAT8E5M2", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ", "INT16", "UINT16"})


def unsupported(job: Job[TensorRTOptions]) -> list[Reason]:
    """Every reason why TensorRT, or this lowering, cannot take a model, by operator and PyTorch module; repeated reasons are merged."""
    model, options = job.onnx, job.options
    reasons: dict[Reason, None] = dict.fromkeys(_capabilities(job))
    inputs = [(value.name or "", dims(value) or ()) for value in model.graph.inputs]
    reasons.update(dict.fromkeys(profiles_of(inputs, job.sizes)[1]))
    if job.loop is not None:
        reasons.update(dict.fromkeys(_within_loop(job)))
    functions = {(f.domain, f.name) for f in model.functions.values()}
    for node in _nodes(model, inline=options.ssm_op == "decomposed"):
        where = module_of(node)
        if node.domain == DOMAIN:
            continue
        if node.domain and (node.domain, node.op_type) not in functions:
            what = f"operator {node.domain}::{node.op_type} has neither a plugin nor a function body in the file"
            reasons[Reason(what, where, "add a function body")] = None
        elif not node.domain:
            reasons.update(dict.fromkeys(Reason(what, where, fix) for what, fix in _refused(node)))
        for value in node.outputs:
            if value.dtype is not None and value.dtype.name in _TYPES:
                what = f"{node.op_type} computes in {value.dtype.name.lower()}, which TensorRT lacks"
                reasons[Reason(what, where, "use float32 or smaller")] = None
    for value in model.graph.inputs:
        if value.dtype is not None and value.dtype.name in _TYPES:
            what = f"the input has type {value.dtype.name.lower()}, which TensorRT lacks"
            reasons[Reason(what, value.name or "", "use float32 or smaller")] = None
    return list(reasons)


def _nodes(model: ir.Model, *, inline: bool) -> Iterator[ir.Node]:
    """All nodes that TensorRT will see: with `inline`, those in the bodies of our own operators too."""
    import onnx_ir as ir

    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        if inline or function.domain != DOMAIN:
            yield from ir.traversal.RecursiveGraphIterator(function.graph)


def _capabilities(job: Job[TensorRTOptions]) -> Iterator[Reason]:
    if not isinstance(job.options, RTXOptions):
        return
    chosen = job.options.compute_capability
    if job.precision == "fp8" and (without := [c for c in chosen if c not in FP8_CAPABILITIES]):
        what = f"GPUs of compute capability {', '.join(without)} have no FP8, expected some of {', '.join(FP8_CAPABILITIES)}"
        yield Reason(what, fix="choose others with --compute-capability, or --precision fp16")
    if job.precision == "int4" and (without := [c for c in chosen if c not in INT4_CAPABILITIES]):
        what = f"GPUs of compute capability {', '.join(without)} read no INT4 weights, expected some of {', '.join(INT4_CAPABILITIES)}"
        yield Reason(what, fix="choose others with --compute-capability, or --precision fp16")
    nodes = custom_nodes(job.onnx) if job.options.ssm_op == "plugin" else []
    if nodes and (without := [c for c in chosen if c not in KERNELS]):
        names = ", ".join(sorted({node.op_type for node in nodes}))
        what = f"the kernels of {names} are compiled for compute capability {', '.join(KERNELS)}, and not for {', '.join(without)}"
        yield Reason(what, module_of(nodes[0]), "choose others with --compute-capability, or --ssm-op decomposed")


def _within_loop(job: Job[TensorRTOptions]) -> Iterator[Reason]:
    """What TensorRT-RTX 1.7.1 does not compile when it stands in the loop of a sampler; found by building it."""
    fix = "choose --sampler step"
    for node in _nodes(job.onnx, inline=False):
        if node.domain == DOMAIN and job.options.ssm_op == "plugin" and isinstance(job.options, RTXOptions):
            what = f"{node.op_type} runs as a plugin, and TensorRT-RTX infers no type for one within a loop"
            yield Reason(what, module_of(node), fix)
        elif is_op(node, "Attention") and not writable(node):
            yield Reason("this form of Attention cannot be written out, and TensorRT compiles none within a loop", module_of(node), fix)


def _refused(node: ir.Node) -> Iterator[tuple[str, str]]:
    """What TensorRT refuses of a standard operator, and what to do about it. Found by building each with TensorRT-RTX 1.7.1."""
    match node.op_type:
        case name if name in UNKNOWN_OPERATORS:
            yield f"{name} is not supported", "compute it with other operators"
        case "NonZero":
            yield "NonZero is not supported: its output's size depends on values", "select with a mask (torch.where)"
        case "ScatterND" | "ScatterElements" if (kind := _text(node, "reduction", "none")) != "none":
            yield f"{node.op_type} with reduction {kind} is not supported", "scatter without a reduction, or use a matrix product"
        case "TopK" if (k := constant(input_at(node, 1))) is not None and k.size == 1 and int(k.reshape(())) > TOP_K_LIMIT:
            yield f"TopK of {int(k.reshape(()))} elements is not supported, expected at most {TOP_K_LIMIT}", "take fewer"
        case "Attention":
            if "softcap" in node.attributes and node.attributes["softcap"].as_float():
                yield "Attention with softcap is not supported", "write it as matrix products and a softmax"
            if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
                yield "Attention with key and value outputs is not supported", "concatenate the keys and values outside of it"
        case "Loop":
            if input_at(node, 1) is None:
                yield "Loop without a condition is not supported", "give it a constant condition that is true"
            yield from _steps("Loop", _constant_int(input_at(node, 0)))
        case "Scan":
            count = attribute_int(node, "num_scan_inputs", 0) or 0
            sequences = list(node.inputs)[-count:] if count else []
            axes = node.attributes["scan_input_axes"].as_ints() if "scan_input_axes" in node.attributes else [0] * count
            for value, axis in zip(sequences, axes, strict=False):
                shape = dims(value)
                if shape is not None and -len(shape) <= axis < len(shape) and isinstance(length := shape[axis], int):
                    yield from _steps("Scan", length)
                    return


def _steps(name: str, steps: int | None) -> Iterator[tuple[str, str]]:
    if steps is not None and steps > LOOP_LIMIT:
        yield f"{name} of {steps} steps launches its kernels {steps} times, expected at most {LOOP_LIMIT}", "choose --ssm-op plugin"


def _constant_int(value: ir.Value | None) -> int | None:
    array = constant(value)
    return int(array.reshape(())) if array is not None and array.size == 1 else None


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_string()
