"""The options of `--target coreai`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CoreAIOptions(BaseModel):
    """How an asset is written, and how it is executed on this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shapes: Literal["range", "fixed"] = Field(
        "range", description="Sizes of the inputs: all of the models' ranges, or those of the example alone."
    )
    timeout: int = Field(
        600, ge=1, le=86400, description="Seconds that the conversion, and one call of the asset, may take on this machine."
    )
