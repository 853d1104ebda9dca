"""The options of `--target coreml`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class CoreMLOptions(BaseModel):
    """How an ML Program is written, and where Core ML is to run it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minimum_deployment_target: Literal["iOS16", "iOS17", "iOS18", "iOS26"] = Field(
        "iOS18", description="The oldest system that can run the package. macOS, watchOS and tvOS of the same year are meant as well."
    )
    compute_units: Literal["all", "cpu-and-ne", "cpu-and-gpu", "cpu-only"] = Field(
        "all", description="Where Core ML may run it: written down for the application, and used where the package is run on this machine."
    )
    shapes: Literal["fixed", "enumerated", "range", "functions"] = Field(
        "fixed",
        description="Sizes of the inputs: those of the example alone, as the Neural Engine wants; a few (the smallest, the example's and "
        "the largest); all of a range; or a function of fixed sizes for each of the few, with the weights stored once.",
    )
    states: tuple[str, ...] = Field(
        (),
        description="Inputs that Core ML keeps from call to call, in the order of the outputs that replace them, which are the last ones.",
    )
    layout: Literal["plain", "ane"] = Field(
        "plain", description="ane writes linear layers as 1x1 convolutions over (B, C, 1, S), and what else the Neural Engine prefers."
    )
    attention: Literal["original", "split-einsum"] = Field(
        "original", description="Attention as one operation, or head by head in the form that the Neural Engine prefers."
    )
    scan_precision: Literal["fp16", "fp32"] = Field(
        "fp16", description="What scans and linear attention compute in; fp32 is more precise, and keeps them off the Neural Engine."
    )
    keep: tuple[str, ...] = Field(
        (), description="Patterns of weights that stay in fp16 where weights are compressed, by their names in PyTorch: 'blocks.0.*'."
    )
    chunk_size: int = Field(
        0,
        ge=0,
        le=2**20,
        description="Cut the model into packages whose weights stay below so many MiB; 0 writes one. iOS takes 1 GB a file.",
    )

    @field_validator("keep", "states")
    @classmethod
    def _not_empty(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not all(names):
            raise ValueError("a name is empty")
        return names
