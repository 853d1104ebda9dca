"""The options of `--target tensorrt` and `--target tensorrt-rtx`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX 1.7 builds plans for: its enumeration `ComputeCapability`, which has no 9.0."""

FP8_CAPABILITIES = ("8.9", "12.0", "12.1")
"""Those among them that compute in FP8 (TensorRT-RTX documentation, "Support Matrix")."""


INT4_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Those that read INT4 weights: TensorRT-RTX 1.7.1 refuses to build such a graph for 7.5."""


class TensorRTOptions(BaseModel):
    """What both targets take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fp8_include: tuple[str, ...] = Field(
        (), description="With --precision fp8: patterns of PyTorch module paths that compute in FP8 although the default leaves them out."
    )
    fp8_exclude: tuple[str, ...] = Field(
        (), description="With --precision fp8: patterns of PyTorch module paths that stay in half precision, for example 'blocks.0.*'."
    )
    int4_block: Literal["32", "64", "128"] = Field(
        "32", description="With --precision int4: neighbouring inputs of a weight that share a scale. Fewer are nearer, more are smaller."
    )
    int4_include: tuple[str, ...] = Field(
        (), description="With --precision int4: patterns of PyTorch module paths whose weights are INT4 against the default."
    )
    int4_exclude: tuple[str, ...] = Field(
        (), description="With --precision int4: patterns of PyTorch module paths whose weights stay in half precision."
    )
    workspace: int = Field(0, ge=0, le=2**20, description="Memory that the builder's kernels may use beyond tensors, in MiB; 0: no limit.")
    ssm_op: Literal["plugin", "decomposed"] = Field(
        "plugin",
        description="How scans and linear attention are written: as nodes of our own, which our plugin runs, or as plain operators.",
    )
    build_timeout: int = Field(3600, ge=1, le=7 * 86_400, description="After how many seconds a build that does not end is ended.")

    @field_validator("int4_block", mode="before")
    @classmethod
    def _text(cls, block: object) -> object:
        return str(block) if isinstance(block, int) else block

    @field_validator("fp8_include", "fp8_exclude", "int4_include", "int4_exclude")
    @classmethod
    def _not_empty(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if not all(patterns):
            raise ValueError("a pattern is empty")
        return patterns


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
