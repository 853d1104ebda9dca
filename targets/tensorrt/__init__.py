"""TensorRT, for the H100: an ONNX file that is exactly what TensorRT gets, its plugins, and the engine that is built from them there."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel

from ...exporter.target import register_target
from .base import TensorRTTarget
from .options import DatacenterOptions
from .recipe import Library


@register_target("tensorrt", summary="TensorRT on H100: fp8, fp16, bf16 or int4 weights, built where the GPU is")
class TensorRT(TensorRTTarget[DatacenterOptions]):
    """Builds on the H100, with the package `tensorrt`; lowers everywhere."""

    Options: ClassVar[type[BaseModel]] = DatacenterOptions
    library: ClassVar[Library] = "tensorrt"
    needs_gpu: ClassVar[bool] = True

    def compute_capabilities(self, options: DatacenterOptions) -> tuple[str, ...]:  # noqa: ARG002 - there is one
        """That of the H100."""
        return ("9.0",)

    def device(self, options: DatacenterOptions) -> str:  # noqa: ARG002 - there is one
        """The H100."""
        return "NVIDIA H100 (sm_90)"
