"""Writes the ONNX file that TensorRT and TensorRT-RTX get: half precision with float32 islands, and FP8 where it was asked for."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...exporter import onnx as onnx_files
from ...exporter.errors import IsthmusError
from ...exporter.manifest import Column, Table
from ...exporter.ops.onnx_forms import add_functions, custom_nodes
from ...exporter.passes import optimise
from ...exporter.passes._rewrite import dims
from ...exporter.passes.expand_attention_mask import ExpandAttentionMask
from ...exporter.passes.fp8_layers import HEAD_LIMIT, Selection, select
from ...exporter.passes.half_precision import ToHalf, overflowing
from ...exporter.passes.inline_custom_operators import InlineCustomOperators
from ...exporter.passes.name_values import NameValues
from ...exporter.passes.quantize_fp8 import QuantizeFp8
from ...exporter.passes.write_attention import WriteAttention
from ...exporter.target import Job
from ..onnxruntime import narrow
from .coverage import coverage

MODEL = "model.onnx"

_DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "fp8": ir.DataType.FLOAT16, "int4": ir.DataType.FLOAT16}
SMALLEST_HEAD = 16
"""Smallest head size that TensorRT's Attention takes."""

_LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 3.3895313892515355e38}


def selection(job: Job[Any]) -> Selection:
    """The layers of a job that compute in FP8; in int4 those whose weights are INT4.

    Raises:
        UsageError: A pattern of `--fp8-include` or `--fp8-exclude`, or of those of int4, matches no module with a matrix product.
    """
    if job.precision == "int4":
        return narrow.selection(job)
    return select(job.onnx, include=job.options.fp8_include, exclude=job.options.fp8_exclude).matched()


def write_model(job: Job[Any], folder: Path) -> tuple[list[str], dict[str, Any], list[Table]]:
    """Writes `model.onnx` and checks it.

    Args:
        job: In `fp16`, `bf16`, `fp8` or `int4`; FP8 needs its calibration.
        folder: The bundle's folder.

    Returns:
        Sentences for the report; figures for the manifest: `opset`, `nodes`, `operators`, `weight_bytes`, `file_bytes`; in fp8 also `fp8`
        (`layers` and `excluded`, by node and module), in int4 the same as `int4`; and `coverage`. In fp8 and int4, tables for the report.

    Raises:
        IsthmusError: The written file is not valid ONNX, or the calibration is missing.
        UsageError: See `selection`.
    """
    model = job.onnx.clone()
    if ExpandAttentionMask()(model).modified:
        NameValues()(model)
    dtype = _DTYPES[job.precision]
    convert = ToHalf(keep_modules=overflowing(job.peaks, _LARGEST[dtype]), dtype=dtype)
    model = convert(model).model
    notes = [convert.summary()]
    details: dict[str, Any] = {}
    if job.precision == "fp8":
        found, facts = _quantize(job, model)
        notes += found
        details |= facts
    tables: list[Table] = []
    if job.precision == "int4":
        # TensorRT-RTX 1.7.1 keeps the weights in 4 bits in its plans for compute capability 8.0 and later, in blocks of 32, 64 and 128.
        found, facts, tables = narrow.quantize(job, model, dtype=dtype, wide="half precision")
        notes += found
        details |= facts
    WriteAttention(_refused)(model)
    for node in model.graph:
        # TensorRT refuses to be told; in ONNX Runtime it asks for what the CPU does anyway.
        node.attributes.pop("softmax_precision", None)
    if nodes := custom_nodes(model):
        if job.options.ssm_op == "decomposed":
            InlineCustomOperators()(model)
            optimise(model, fuse=False)
            notes.append(f"{len(nodes)} operators of our own are written as plain standard operators")
        else:
            add_functions(model)
            notes.append(f"{len(nodes)} nodes of our own run as plugins; each has a body in the file, which ONNX Runtime runs")
    path = folder / MODEL
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    weight_bytes = sum(t.nbytes for t in weights)
    onnx_files.save(model, path, bytes_of_weights=weight_bytes)
    onnx_files.check(path, opset=model.opset_imports[""])
    counts = collections.Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))
    table = coverage(model, {name: size.opt for name, size in job.sizes.items()})
    figures = {
        "opset": model.opset_imports[""],
        "nodes": counts.total(),
        "operators": dict(sorted(counts.items())),
        "weight_bytes": weight_bytes,
        "file_bytes": sum(p.stat().st_size for p in folder.glob(f"{MODEL}*")),
        **details,
        "coverage": table.value(),
    }
    return notes, figures, [table.table(), _left(details["fp8"]["excluded"])] if job.precision == "fp8" else tables


def _left(excluded: Sequence[Mapping[str, str]]) -> Table:
    return Table(
        name="fp8-excluded",
        title="Layers that stay in half precision",
        columns=(Column(name="PyTorch module", kind="code"), Column(name="Node", kind="code"), Column(name="Why")),
        rows=tuple((entry["module"], entry["node"], entry["reason"]) for entry in excluded),
    )


def _refused(node: ir.Node) -> bool:
    """Whether TensorRT refuses an Attention node in this form (TensorRT-RTX 1.7.1): float32, or a head size outside 16 to 256."""
    shapes = [dims(value) for value in node.inputs[:3]]
    sizes = {shape[3] for shape in shapes if shape is not None}
    fits = all(isinstance(size, int) and SMALLEST_HEAD <= size <= HEAD_LIMIT for size in sizes)
    return node.outputs[0].dtype == ir.DataType.FLOAT or not fits


def _quantize(job: Job[Any], model: ir.Model) -> tuple[list[str], dict[str, Any]]:
    calibration = job.calibration
    if calibration is None:
        raise IsthmusError("fp8 needs calibration data", hint="give --calibration-data")
    found = selection(job)
    quantize = QuantizeFp8(found, calibration.ranges("e4m3"), job.onnx, weights=job.weights)
    quantize(model)
    left = [*found.excluded, *quantize.skipped]
    notes = [
        f"{len(quantize.written)} matrix products compute in FP8 (E4M3), {len(left)} layers stay in half precision",
        calibration.sentence(),
    ]
    facts: Mapping[str, Any] = {
        "fp8": {
            "layers": [{"node": node, "module": module} for node, module in quantize.written],
            "excluded": [{"node": e.node, "module": e.module, "reason": e.reason} for e in left],
        }
    }
    return notes, dict(facts)
