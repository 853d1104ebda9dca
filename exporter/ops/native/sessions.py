"""One node in ONNX Runtime with the native library, for tests and benchmarks: the model has no body, so that only the kernel can run it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ...op import OPS, CustomOp
from ..onnx_models import node_of, one_node

Array = np.ndarray[Any, Any]
_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


@functools.lru_cache(maxsize=256)
def session(name: str, op_type: str, attributes: tuple[tuple[str, Any], ...], dtype: str, library: Path, threads: int = 1) -> Any:
    """An `onnxruntime.InferenceSession` over one node of an operator; every size but those that attributes give is dynamic.

    Args:
        name: The operator.
        op_type: Its form.
        attributes: All attributes, as `node_of` returns them.
        dtype: Of the activations.
        library: The native library.
        threads: Threads within the operator.
    """
    import onnxruntime as ort

    op = OPS[name]
    form = next(f for f in op.forms if f.op_type == op_type)
    model = one_node(op, form, dict(attributes), _TYPES[dtype])
    model.functions.clear()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(op: CustomOp, inputs: Mapping[str, Array], attributes: Mapping[str, Any], library: Path) -> dict[str, Array]:
    """Runs an operator's node on one thread; inputs that the call has not are zeros. Returns the outputs by name."""
    form, settled, operands = node_of(op, inputs, attributes)
    operands = {name: np.ascontiguousarray(x) for name, x in operands.items()}  # held until the end: the session reads them in place
    first = inputs[op.inputs[0].name].dtype
    opened = session(op.name, form.op_type, tuple(settled.items()), str(first), library)
    shapes = op.output_shapes(op.infer({name: x.shape for name, x in inputs.items()}, op.resolve(attributes)))
    outputs = {a.name: np.full(shapes[a.name], np.nan, np.float32 if a.wide else first) for a in op.outputs}
    # The arrays are bound in place: bfloat16, which is no dtype of numpy's, could not be copied out.
    binding = opened.io_binding()
    for name, x in operands.items():
        binding.bind_ortvalue_input(name, _value(x))
    for name, x in outputs.items():
        binding.bind_ortvalue_output(name, _value(x))
    opened.run_with_iobinding(binding)
    return outputs


def _value(x: Array) -> Any:
    import onnxruntime as ort

    if x.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), int(ir.DataType.BFLOAT16))
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(x, int(_TYPES[str(x.dtype)]))
