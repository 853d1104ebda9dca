"""The options of `--target tensorrt` and `--target tensorrt-rtx`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ...exporter.precision_options import NarrowOptions

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX 1.7 builds plans for: its enumeration `ComputeCapability`, which has no 9.0."""

FP8_CAPABILITIES = ("8.9", "12.0", "12.1")
"""Those among them that compute in FP8 (TensorRT-RTX documentation, "Support Matrix")."""


INT4_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Those that read INT4 weights: TensorRT-RTX 1.7.1 refuses to build such a graph for 7.5."""


class TensorRTOptions(NarrowOptions):
    """What both targets take."""

    fp8_include: tuple[str, ...] = Field(
        (), description="With --precision fp8: patterns of PyTorch module paths that compute in FP8 although the default leaves them out."
    )
    fp8_exclude: tuple[str, ...] = Field(
        (), description="With --precision fp8: patterns of PyTorch module paths that stay in half precision, for example 'blocks.0.*'."
    )
    workspace: int = Field(0, ge=0, le=2**20, description="Memory that the builder's kernels may use beyond tensors, in MiB; 0: no limit.")
    ssm_op: Literal["plugin", "decomposed"] = Field(
        "plugin",
        description="How scans and linear attention are written: as nodes of our own, which our plugin runs, or as plain operators.",
    )
    build_timeout: int = Field(3600, ge=1, le=7 * 86_400, description="After how many seconds a build that does not end is ended.")


class DatacenterOptions(TensorRTOptions):
    """Options of `--target tensorrt`."""

    timing_cache: str = Field(
        "", description="File that keeps the builder's measurements for the next build; by default one in the user's cache folder."
    )


class RTXOptions(TensorRTOptions):
    """Options of `--target tensorrt-rtx`."""

    compute_capability: tuple[str, ...] = Field(
        ("8.9", "12.0"), min_length=1, description=f"The GPUs that the plan is for: {', '.join(CAPABILITIES)}."
    )

    @field_validator("compute_capability")
    @classmethod
    def _known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [v for v in values if v not in CAPABILITIES]:
            h100 = "; an H100 (9.0) is built for with --target tensorrt" if "9.0" in unknown else ""
            raise ValueError(f"TensorRT-RTX does not know {', '.join(unknown)}, expected some of {', '.join(CAPABILITIES)}{h100}")
        if len(set(values)) != len(values):
            raise ValueError("a compute capability is given twice")
        return values
