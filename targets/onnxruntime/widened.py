"""Executes bfloat16 files in ONNX Runtime on the CPU, which has no kernels for them: in float32, every value rounded to bfloat16."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from ...exporter import onnx as onnx_files
from ...exporter.passes.widen_bfloat16 import WidenBfloat16
from .session import OnnxRuntimeRunner


class WidenedRunner(OnnxRuntimeRunner):
    """A session over a file whose bfloat16 nodes are computed in float32 and rounded; see `WidenBfloat16`. Raises like its base."""

    def __init__(self, path: Path) -> None:
        model = ir.load(path)
        WidenBfloat16()(model)
        weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        self._folder = tempfile.TemporaryDirectory(prefix="isthmus-")
        try:
            copy = Path(self._folder.name) / path.name
            onnx_files.save(model, copy, bytes_of_weights=weights)
            super().__init__(copy, lean=True)
        except BaseException:
            self._folder.cleanup()
            raise
        self.device += ", float32 rounded to bfloat16"

    def close(self) -> None:
        """Frees the session, and removes the rewritten file."""
        super().close()
        self._folder.cleanup()
