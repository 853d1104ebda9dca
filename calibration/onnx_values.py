"""The values inside an ONNX file, as ONNX Runtime computes them: taken out as further outputs of the graph, a few at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..exporter.errors import IsthmusError, MachineError
from ..exporter.flow import Flow, Step, Values
from ..exporter.passes import module_of
from ..exporter.passes.infer_shapes import InferShapes
from ..exporter.passes.widen_bfloat16 import WidenBfloat16
from ..exporter.spec import Arrays

_SHAPE, _FLOAT = ".isthmus.shape", ".isthmus.float"
_NOT_IN_NUMPY = frozenset({ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2})
"""Types that ONNX Runtime does not hand out as arrays: such values are taken out as float32, which holds all of them exactly."""
_WEIGHTS = "weights"
_INLINE = 2**20
"""Bytes of weights up to which a graph is handed to ONNX Runtime with its weights in it; above, they lie in a file that it maps."""


class OnnxValues(Values):
    """An ONNX graph in ONNX Runtime on the CPU.

    A value that is taken out cannot be fused away, so that ONNX Runtime's optimiser may compute a little otherwise than it does without.

    Args:
        model: A path, or a graph, which is not changed.
        kernels: The library of our operators' CPU kernels; None for their bodies in the file.
        optimise: Let ONNX Runtime optimise the graph, as it does when the file is used.

    Raises:
        MachineError: onnxruntime is not installed.
        IsthmusError: The file cannot be read.
    """

    def __init__(self, model: Path | ir.Model, *, kernels: Path | None = None, optimise: bool = True) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MachineError(
                "a graph's values are computed in ONNX Runtime, which is not installed", hint="pip install 'isthmus[cpu]'"
            ) from error
        self._ort: Any = ort
        self._kernels, self._optimise = kernels, optimise
        self._temporary = tempfile.TemporaryDirectory(prefix="isthmus-")
        try:
            self._model = _read(model) if isinstance(model, Path) else model.clone()
            self.flow = flow_of(self._model)
            WidenBfloat16()(self._model)
            _add_types(self._model)
            self._folder = self._externalise(model.parent if isinstance(model, Path) else None)
        except BaseException:
            self._temporary.cleanup()
            raise
        self._values = {v.name: v for v in (*self._model.graph.inputs, *(v for n in self._model.graph for v in n.outputs)) if v.name}
        self.device = f"ONNX Runtime {ort.__version__} on the CPU"

    def close(self) -> None:
        """Removes the temporary file of weights."""
        self._temporary.cleanup()

    def shapes(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
        """See `Values.shapes`. Only the shapes leave ONNX Runtime."""
        known = [name for name in names if name in self._values]
        found = self._run(inputs, known, shapes=True)
        return {name: tuple(int(size) for size in found[name]) for name in known}

    def read(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, np.ndarray[Any, Any]]:
        """See `Values.read`."""
        return self._run(inputs, names, shapes=False)

    def _run(self, inputs: Arrays, names: Sequence[str], *, shapes: bool) -> dict[str, np.ndarray[Any, Any]]:
        given = {name: np.asarray(inputs[name]) for name in names if name in inputs}
        asked = [name for name in dict.fromkeys(names) if name not in given]
        found = {name: np.array(a.shape) if shapes else a for name, a in given.items()}
        if not asked:
            return found
        session = self._session(asked, shapes=shapes)
        suffixes = {name: _SHAPE if shapes else _FLOAT if self._values[name].dtype in _NOT_IN_NUMPY else "" for name in asked}
        outputs = [name + suffix for name, suffix in suffixes.items()]
        try:
            found.update(zip(asked, session.run(outputs, dict(inputs)), strict=True))
        except Exception as error:  # its exception classes live in a private module
            raise IsthmusError(f"ONNX Runtime failed on the graph: {str(error).splitlines()[0]}") from error
        return found

    def _session(self, names: Sequence[str], *, shapes: bool) -> Any:
        ort = self._ort
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # errors arrive as exceptions
        levels = ort.GraphOptimizationLevel
        settings.graph_optimization_level = levels.ORT_ENABLE_ALL if self._optimise else levels.ORT_DISABLE_ALL
        # One run and no more: neither packed copies of the weights nor an arena pay.
        settings.add_session_config_entry("session.disable_prepacking", "1")
        settings.enable_cpu_mem_arena = False
        settings.enable_mem_pattern = False
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        if self._kernels is not None:
            settings.register_custom_ops_library(str(self._kernels))
        try:
            return ort.InferenceSession(self._with_outputs(names, shapes=shapes), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception classes live in a private module
            raise IsthmusError(f"ONNX Runtime {ort.__version__} refuses the graph: {str(error).splitlines()[0]}") from error

    def _with_outputs(self, names: Sequence[str], *, shapes: bool) -> bytes:
        graph = self._model.graph
        own, added = list(graph.outputs), []
        try:
            for name in names:
                value = self._values[name]
                if shapes:
                    added.append(_after(value, "Shape", {}, name + _SHAPE, ir.DataType.INT64))
                elif value.dtype in _NOT_IN_NUMPY:
                    added.append(_after(value, "Cast", {"to": int(ir.DataType.FLOAT)}, name + _FLOAT, ir.DataType.FLOAT))
                elif value not in own:
                    graph.outputs.append(value)
            for node in added:
                graph.append(node)
                graph.outputs.append(node.outputs[0])
            return bytes(ir.serde.serialize_model(self._model).SerializeToString())
        finally:
            while len(graph.outputs) > len(own):
                graph.outputs.pop()
            graph.remove(added, safe=True)

    def _externalise(self, beside: Path | None) -> Path:
        """Puts weights that are in memory into a file, once, and returns the folder that the graph's weights lie in.

        Args:
            beside: The folder of the graph's file, where its external weights are; None for a graph in memory.
        """
        tensors = [v.const_value for v in self._model.graph.initializers.values() if v.const_value is not None]
        if beside is not None and any(isinstance(t, ir.ExternalTensor) for t in tensors):
            return beside
        folder = Path(self._temporary.name)
        if sum(t.nbytes for t in tensors) > _INLINE:
            ir.save(self._model, folder / "model.onnx", external_data=_WEIGHTS, max_workers=1, max_in_flight_bytes=256 * 2**20)
            self._model = ir.load(folder / "model.onnx")
        return folder


def _add_types(model: ir.Model) -> None:
    """Finds out the types of values that do not say theirs: how a value is taken out depends on it."""
    values = [value for node in model.graph for value in node.outputs]
    if all(value.type is not None for value in values):
        return
    # A graph that does not say all was edited, and what it says of shapes may be of before: ONNX Runtime infers them itself.
    for value in values:
        value.shape = None
    InferShapes()(model)
    for value in values:
        value.shape = None


def _after(value: ir.Value, operator: str, attributes: dict[str, Any], name: str, dtype: ir.DataType) -> ir.Node:
    node = ir.node(operator, [value], attributes)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
    return node


def flow_of(model: ir.Model) -> Flow:
    """The main graph as a list of steps. A node with subgraphs, and a call of a function, is one step."""
    steps = tuple(
        Step(
            node.name or "",
            node.op_type if node.domain == "" else f"{node.domain}::{node.op_type}",
            module_of(node),
            tuple(dict.fromkeys(_reads(node))),
            tuple(v.name for v in node.outputs if v.name),
        )
        for node in model.graph
    )
    return Flow(steps, tuple(str(v.name) for v in model.graph.inputs), tuple(str(v.name) for v in model.graph.outputs))


def _reads(node: ir.Node) -> Iterator[str]:
    yield from (v.name for v in node.inputs if v is not None and v.name)
    for attribute in node.attributes.values():
        graphs = attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()
        graphs = (attribute.as_graph(),) if attribute.type == ir.AttributeType.GRAPH else graphs
        for graph in graphs:
            for inner in ir.traversal.RecursiveGraphIterator(graph):
                yield from (v.name for v in inner.inputs if v is not None and v.name)
            yield from (str(v.name) for v in graph.outputs)


def _read(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:  # protobuf, onnx_ir and the file system raise what they like
        raise IsthmusError(f"{path} cannot be read as ONNX: {error}", hint="export again, or copy the bundle again") from error
