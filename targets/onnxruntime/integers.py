"""INT8 for ONNX Runtime: which layers, how they are written, and whether ONNX Runtime makes integer products of them."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...exporter.errors import IsthmusError
from ...exporter.manifest import Column, Table
from ...exporter.passes.fp8_layers import Excluded, Layer, select
from ...exporter.passes.quantize_int8 import ACTIVATIONS, QuantizeInt8, choose
from ...exporter.target import Job

INTEGER_PRODUCTS = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "MatMulInteger", "DynamicQuantizeMatMul", "QLinearConv")
"""What ONNX Runtime's graph has for products that it computes in integers (contrib operators, 1.32)."""

_COUNTED = 2**30  # bytes of weights up to which the optimised graph is written out to be counted


def selection(job: Job[Any]) -> tuple[tuple[Layer, ...], tuple[Excluded, ...]]:
    """The layers of a job that compute in INT8, and those that do not, with the reasons.

    Raises:
        UsageError: A pattern of `--int8-include` or `--int8-exclude` matches no module with a matrix product.
    """
    found = select(job.onnx, include=job.options.int8_include, exclude=job.options.int8_exclude)
    return choose(found.matched(), job.onnx)


def quantize(job: Job[Any], model: ir.Model) -> tuple[list[str], dict[str, Any], list[Table]]:
    """Writes the chosen layers of a copy of the job's graph in INT8, in place.

    Returns:
        Sentences for the report; figures for the manifest: `int8` (`layers` and `excluded`, by node and module); tables for the report.

    Raises:
        IsthmusError: The calibration is missing.
    """
    if job.calibration is None:
        raise IsthmusError("int8 needs calibration data", hint="give --calibration-data")
    layers, excluded = selection(job)
    intervals = {name: job.calibration.interval(name, ACTIVATIONS) for layer in layers for name in layer.observed}
    write = QuantizeInt8(layers, intervals, weights=job.weights, corrections=job.corrections)
    write(model)
    notes = [
        f"{len(write.written)} products compute in INT8, {len(excluded)} layers stay in float32",
        job.calibration.sentence(),
    ]
    table = Table(
        name="int8-excluded",
        title="Layers that stay in float32",
        columns=(Column(name="PyTorch module", kind="code"), Column(name="Node", kind="code"), Column(name="Why")),
        rows=tuple((e.module, e.node, e.reason) for e in excluded),
    )
    facts: Mapping[str, Any] = {
        "int8": {
            "layers": [{"node": node, "module": module} for node, module in write.written],
            "excluded": [{"node": e.node, "module": e.module, "reason": e.reason} for e in excluded],
        }
    }
    return notes, dict(facts), [table]


def integer_products(path: Path, *, weight_bytes: int) -> int | None:
    """How many products of a file ONNX Runtime computes in integers on this machine; see `count_made`."""
    return count_made(path, INTEGER_PRODUCTS, weight_bytes=weight_bytes)


def count_made(path: Path, operators: Sequence[str], *, weight_bytes: int) -> int | None:
    """How many nodes of some operators ONNX Runtime makes of a file on this machine; None where that cannot be told.

    It is asked to write the graph that it made. Weights of more than 1 GiB are not written out for that.

    Raises:
        IsthmusError: ONNX Runtime refuses the file.
    """
    from .session import installed

    if weight_bytes > _COUNTED or not installed()[0]:
        return None
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="isthmus-") as temporary:
        made = Path(temporary) / "optimised.onnx"
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # it warns that what it writes is for this machine, which is what is asked for
        settings.optimized_model_filepath = str(made)
        try:
            ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception classes live in a private module
            raise IsthmusError(f"ONNX Runtime {ort.__version__} refuses {path.name}: {str(error).splitlines()[0]}") from error
        counts = collections.Counter(node.op_type for node in onnx.load(made).graph.node)
    return sum(counts[operator] for operator in operators)
