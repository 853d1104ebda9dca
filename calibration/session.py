"""Runs an ONNX graph that is still in memory, in ONNX Runtime, without a second copy of its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..exporter.errors import IsthmusError, MachineError
from ..exporter.passes._rewrite import TRANSPOSE_OF
from ..exporter.passes.expand_attention_mask import ExpandAttentionMask
from ..exporter.spec import Arrays

_WEIGHTS = "weights"
SHARED = 4096
"""Bytes from which on a weight is shared; smaller ones go into the serialised graph."""


class GraphSession:
    """A float32 graph in ONNX Runtime on the CPU. The weights stay where they are: those of `model`, or of the PyTorch module behind it.

    Args:
        model: The graph; not changed.
        outputs: Names of further values of the main graph that become outputs.

    Raises:
        MachineError: onnxruntime is not installed.
        IsthmusError: ONNX Runtime refuses the graph.
    """

    def __init__(self, model: ir.Model, *, outputs: Sequence[str] = ()) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MachineError(
                "calibration runs the graph in ONNX Runtime, which is not installed", hint="pip install 'isthmus[cpu]'"
            ) from error
        copy = model.clone()
        values = {value.name: value for node in copy.graph for value in node.outputs}
        copy.graph.outputs.extend(values[name] for name in outputs if not values[name].is_graph_output())
        copy.graph.opset_imports["com.microsoft"] = 1
        ExpandAttentionMask()(copy)
        for value in (value for node in copy.graph for value in node.outputs if not value.is_graph_output()):
            value.shape = value.type = None  # ONNX Runtime finds them itself; written and read, they take longer than the nodes
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        # Optimisers read weights, and what they would find is the empty file below.
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Packed weights would be a copy of all of them.
        settings.add_session_config_entry("session.disable_prepacking", "1")
        # ONNX Runtime holds addresses of the values, and these hold addresses of the arrays: neither keeps the other alive.
        self._weights: list[tuple[np.ndarray[Any, Any], Any]] = []
        largest = 0
        for name, value in copy.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < SHARED:
                continue
            array = _shared(value, tensor)
            shared = ort.OrtValue.ortvalue_from_numpy(array)
            self._weights.append((array, shared))
            settings.add_initializer(name, shared)
            largest = max(largest, array.nbytes)
            value.const_value = ir.ExternalTensor(_WEIGHTS, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name)
        try:
            with tempfile.TemporaryDirectory(prefix="isthmus-") as temporary:
                # ONNX Runtime wants the file of weights to be there, though it reads none of those that it is given. One without blocks
                # does; `add_external_initializers`, which needs no file, copies every weight (1.32).
                folder = Path(temporary)
                with (folder / _WEIGHTS).open("wb") as file:
                    file.truncate(largest)
                path = folder / "model.onnx"
                path.write_bytes(ir.serde.serialize_model(copy).SerializeToString())
                self._session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception classes live in a private module
            raise IsthmusError(f"ONNX Runtime {ort.__version__} refuses the graph: {str(error).splitlines()[0]}") from error
        self._names = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Arrays, names: Sequence[str] | None = None) -> Mapping[str, np.ndarray[Any, Any]]:
        """Outputs by name: every one, or those named.

        Raises:
            IsthmusError: ONNX Runtime fails, as it does on inputs that do not fit.
        """
        try:
            wanted = self._names if names is None else list(names)
            return dict(zip(wanted, self._session.run(wanted, dict(inputs)), strict=True))
        except Exception as error:  # its exception classes live in a private module
            raise IsthmusError(f"ONNX Runtime failed on the graph: {str(error).splitlines()[0]}") from error


def _shared(weight: ir.Value, tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    """The numbers of a weight, where they are if that is possible.

    PyTorch keeps a linear layer's weight as (outputs, inputs), and ONNX's MatMul reads (inputs, outputs), which is made when it is read.
    ONNX Runtime's own FusedMatMul reads it as PyTorch keeps it.
    """
    original, uses = weight.meta.get(TRANSPOSE_OF), list(weight.uses())
    readable = all(node.domain == "" and node.op_type == "MatMul" and index == 1 for node, index in uses)
    if original is None or not readable or len(tensor.shape) != 2:
        return np.ascontiguousarray(tensor.numpy())
    for node, _ in uses:
        node.domain, node.op_type = "com.microsoft", "FusedMatMul"
        node.attributes["transB"] = ir.AttrInt64("transB", 1)
    array = np.ascontiguousarray(original.numpy())
    weight.shape = ir.Shape(array.shape)
    return array
