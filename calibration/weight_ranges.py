"""The ranges of the weights that an artifact stores on a quantised grid, as a table of the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..exporter.grids import GRIDS
from ..exporter.manifest import Column, Table
from ..exporter.passes import module_of

Array = np.ndarray[Any, Any]

NAME = "weights"
"""The table's name."""

_GRID_OF = {ir.DataType.FLOAT8E4M3FN: "e4m3", ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8", ir.DataType.INT4: "int4"}


def weight_table(path: Path) -> Table | None:
    """The weights of an ONNX file that are stored as codes; None where there are none.

    A weight at the end of its grid may have been larger: it is clipped there. A range of the largest |weight| puts one weight of each
    channel there, and clips none.

    Args:
        path: The file. Weights are read one at a time; those in a file of their own stay there.

    Raises:
        OSError, ValueError: The file cannot be read.
    """
    rows = tuple(_rows(ir.load(path)))
    if not rows:
        return None
    return Table(
        name=NAME,
        title="Ranges of weights",
        lead="The weights that are stored as codes, read back. A weight at the end of the grid is as large as can be represented, or was "
        "larger and is clipped; a range of the largest |weight| puts one of each channel there. A weight that is stored as 0 was smaller "
        "than half the smallest step. Scales apart: the largest scale of a channel over the smallest.",
        columns=(
            Column(name="PyTorch module", kind="code"),
            Column(name="Weight", kind="code"),
            Column(name="Shape"),
            Column(name="Grid"),
            Column(name="Smallest", kind="number"),
            Column(name="Largest", kind="number"),
            Column(name="Scales apart", kind="number"),
            Column(name="At the grid's end", kind="share"),
            Column(name="Stored as 0", kind="share"),
        ),
        rows=rows,
    )


def _rows(model: ir.Model) -> Iterator[tuple[str | float | None, ...]]:
    for node in model.graph:
        codes, scale, *more = (*node.inputs, None)
        if node.op_type != "DequantizeLinear" or node.domain not in ("", "ai.onnx") or codes is None or scale is None:
            continue
        stored, steps = codes.const_value, scale.const_value
        grid = _GRID_OF.get(stored.dtype) if stored is not None else None
        if stored is None or steps is None or grid is None or stored.size == 0 or "block_size" in node.attributes:
            continue  # blocks of int4 have a scale for a part of a channel
        zero = more[0].const_value if more[0] is not None else None
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        values = stored.numpy().astype(np.float32)
        at_end = (values >= GRIDS[grid].high) | (values <= GRIDS[grid].low)
        read = (values - _along(zero, values.ndim, axis)) * _along(steps, values.ndim, axis)
        scales = steps.numpy().astype(np.float64)
        yield (
            module_of(node),
            codes.name or "",
            "\u00a0×\u00a0".join(map(str, values.shape)),
            grid,
            float(read.min()),
            float(read.max()),
            float(scales.max() / scales.min()) if scales.min() > 0 else None,
            float(at_end.mean()),
            float((read == 0).mean()),
        )


def _along(tensor: ir.TensorProtocol | None, dims: int, axis: int) -> Array:
    """A scalar as it is, and a vector along an axis, as float32; 0 for none."""
    if tensor is None:
        return np.zeros((), np.float32)
    array: Array = tensor.numpy().astype(np.float32)
    return array.reshape([-1 if i == axis % dims else 1 for i in range(dims)]) if array.ndim == 1 and array.size > 1 else array.reshape(())
