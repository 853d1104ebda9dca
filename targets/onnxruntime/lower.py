"""Writes the ONNX file that ONNX Runtime gets."""

from __future__ import annotations

import collections
from pathlib import Path

import onnx_ir as ir

from ...exporter import onnx as onnx_files
from ...exporter.manifest import Table
from ...exporter.passes.expand_attention_mask import ExpandAttentionMask
from ...exporter.passes.half_precision import ToHalf, overflowing
from ...exporter.passes.name_values import NameValues
from ...exporter.sampling import write_sampler
from ...exporter.target import Job, Lowered
from . import narrow
from .experts import write_experts
from .integers import integer_products, quantize
from .ssm_op import write_ssm_op


def lower(job: Job, path: Path) -> Lowered:  # type: ignore[type-arg]  # of any options
    """Writes `job.onnx` to `path` in the precision asked for, and checks the file.

    Raises:
        IsthmusError: The written file is not valid ONNX.
    """
    model = job.onnx.clone()
    if ExpandAttentionMask()(model).modified:
        NameValues()(model)
    notes: list[str] = []
    details: dict[str, object] = {}
    tables: list[Table] = []
    if job.precision == "fp16":
        convert = ToHalf(keep_modules=overflowing(job.peaks))
        model = convert(model).model
        notes.append(convert.summary())
    if job.precision == "int8":
        found, facts, tables = quantize(job, model)
        notes += found
        details |= facts
    if job.precision == "int4":
        found, facts, tables = narrow.quantize(job, model)
        notes += found
        details |= facts
    notes += write_experts(model, job.options.experts, job.options.execution_provider)
    notes += write_ssm_op(model, job.options.ssm_op)
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    onnx_files.save(model, path, bytes_of_weights=sum(t.nbytes for t in weights))
    onnx_files.check(path, opset=model.opset_imports[""])
    if job.precision == "int8":
        products = integer_products(path, weight_bytes=sum(t.nbytes for t in weights))
        details["integer_products"] = products
        if products is not None:
            notes.append(f"ONNX Runtime makes {products} integer products of them on this machine")
    if job.precision == "int4":
        products = narrow.narrow_products(path, weight_bytes=sum(t.nbytes for t in weights))
        details["int4_products"] = products
        full = sum(v.const_value.nbytes for v in job.onnx.graph.initializers.values() if v.const_value is not None)
        notes.append(f"the weights take {sum(t.nbytes for t in weights) / 2**20:.2f} MiB, in float32 {full / 2**20:.2f} MiB")
        if products is not None:
            notes.append(f"ONNX Runtime reads {products} of them in 4 bits on this machine")
    if job.loop is not None:
        sampler = write_sampler(path, job.loop)
        notes.append(sampler.note)
        details["sampler"] = sampler.details
    counts = collections.Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))
    return Lowered(
        device="any ONNX Runtime",
        notes=tuple(notes),
        details={
            "opset": model.opset_imports[""],
            "nodes": counts.total(),
            "operators": dict(sorted(counts.items())),
            "weight_bytes": sum(t.nbytes for t in weights),
            "file_bytes": sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")),
            **details,
        },
        tables=tuple(tables),
    )
