"""TensorRT-RTX, for GPUs of workstations: plans that are built without a GPU, for the compute capabilities that are asked for."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel

from ...exporter.target import register_target
from ..tensorrt.base import TensorRTTarget
from ..tensorrt.options import RTXOptions
from ..tensorrt.recipe import Library


@register_target("tensorrt-rtx", summary="TensorRT-RTX on workstation GPUs: fp8, fp16, bf16 or int4 weights, built on any Linux machine")
class TensorRTRTX(TensorRTTarget[RTXOptions]):
    """Builds anywhere, with the package `tensorrt-rtx`. Its plans are not for an H100, which this library does not know."""

    Options: ClassVar[type[BaseModel]] = RTXOptions
    library: ClassVar[Library] = "tensorrt-rtx"
    needs_gpu: ClassVar[bool] = False

    def compute_capabilities(self, options: RTXOptions) -> tuple[str, ...]:
        """Those asked for."""
        return options.compute_capability

    def device(self, options: RTXOptions) -> str:
        """The GPUs, by their compute capabilities."""
        return f"NVIDIA RTX GPUs of compute capability {', '.join(options.compute_capability)} (TensorRT-RTX)"
