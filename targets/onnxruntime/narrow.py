"""INT4 weights for ONNX Runtime: which layers, how they are written, and whether ONNX Runtime reads them in 4 bits.

What is written is the standard DequantizeLinear in blocks. On the CPU ONNX Runtime makes the same MatMulNBits of it that its own contrib
operator is (1.32): the activation is rounded to 8 bits in blocks as it is read, and the sums are integers. Measured with one thread and
AVX-512 VNNI, blocks of 32, against float32: 6 times as fast for 1 row of 1152 by 4608, 1.1 times for 64 rows of 384 by 1536 and for 256 of
1152 by 4608; 45 dB from the exact product with the same weights, which themselves are 20 dB from the float32 ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...exporter.manifest import Column, Table
from ...exporter.passes.fp8_layers import Selection
from ...exporter.passes.quantize_int4 import QuantizeInt4, choose
from ...exporter.target import Job
from .integers import count_made

READ_IN_4_BITS = ("MatMulNBits",)
"""What ONNX Runtime's graph has for products whose weights it keeps in 4 bits (contrib operators, 1.32)."""


def selection(job: Job[Any]) -> Selection:
    """The layers of a job whose weights are INT4, and those whose are not, with the reasons.

    Raises:
        UsageError: A pattern of `--int4-include` or `--int4-exclude` matches no module with a matrix product.
    """
    return choose(job.onnx, int(job.options.int4_block), include=job.options.int4_include, exclude=job.options.int4_exclude).matched()


def quantize(
    job: Job[Any], model: ir.Model, *, dtype: ir.DataType = ir.DataType.FLOAT, wide: str = "float32"
) -> tuple[list[str], dict[str, Any], list[Table]]:
    """Stores the weights of the chosen layers of a copy of the job's graph in INT4, in place.

    Args:
        job: The job.
        model: The copy, in the type that it computes in.
        dtype: That type.
        wide: Its name, for people.

    Returns:
        Sentences for the report; figures for the manifest: `int4` (`block`, `layers` and `excluded`, by node and module); tables for the
        report.
    """
    chosen = selection(job)
    write = QuantizeInt4(chosen.layers, job.onnx, weights=job.weights, corrections=job.corrections, dtype=dtype)
    write(model)
    excluded = [*chosen.excluded, *write.skipped]
    how = " and ".join(sorted({rounded.how for rounded in job.weights.values()})) or "rounded to nearest"
    notes = [
        f"the weights of {len(write.written)} matrix products are INT4 in blocks of {job.options.int4_block}, "
        f"those of {len(excluded)} stay in {wide}; they are {how}"
    ]
    table = Table(
        name="int4-excluded",
        title=f"Layers whose weights stay in {wide}",
        columns=(Column(name="PyTorch module", kind="code"), Column(name="Node", kind="code"), Column(name="Why")),
        rows=tuple((e.module, e.node, e.reason) for e in excluded),
    )
    facts = {
        "int4": {
            "block": int(job.options.int4_block),
            "layers": [{"node": node, "module": module} for node, module in write.written],
            "excluded": [{"node": e.node, "module": e.module, "reason": e.reason} for e in excluded],
        }
    }
    return notes, facts, [table]


def narrow_products(path: Path, *, weight_bytes: int) -> int | None:
    """How many products of a file ONNX Runtime reads in 4 bits on this machine; see `integers.count_made`."""
    return count_made(path, READ_IN_4_BITS, weight_bytes=weight_bytes)
