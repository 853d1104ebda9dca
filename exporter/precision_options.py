"""Options that the targets with narrow precisions share: which layers are narrow, and the blocks of INT4 weights."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from .errors import UsageError

_PATTERNS = ("_include", "_exclude")


class NarrowOptions(BaseModel):
    """Options of a target that stores weights in INT4; it adds `…_include` and `…_exclude` for its other narrow precisions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    int4_block: Literal["32", "64", "128"] = Field(
        "32", description="With --precision int4: neighbouring inputs of a weight that share a scale. Fewer are nearer, more are smaller."
    )
    int4_include: tuple[str, ...] = Field(
        (), description="With --precision int4: patterns of PyTorch module paths whose weights are INT4 against the default."
    )
    int4_exclude: tuple[str, ...] = Field(
        (), description="With --precision int4: patterns of PyTorch module paths whose weights stay as wide as their activations."
    )

    @field_validator("int4_block", mode="before")
    @classmethod
    def _text(cls, block: object) -> object:
        return str(block) if isinstance(block, int) else block

    @field_validator("*")
    @classmethod
    def _not_empty(cls, value: object, info: ValidationInfo) -> object:
        if (info.field_name or "").endswith(_PATTERNS) and isinstance(value, tuple) and not all(value):
            raise ValueError("a pattern is empty")
        return value

    def check_precision(self, asked: str) -> None:
        """Refuses patterns of layers for another precision than the one asked for.

        Raises:
            UsageError: There are some.
        """
        names = [name for name in type(self).model_fields if name.endswith(_PATTERNS)]
        for precision in dict.fromkeys(name.rpartition("_")[0] for name in names):
            own = [name for name in names if name.startswith(f"{precision}_")]
            if precision != asked and any(getattr(self, name) for name in own):
                options = " and ".join(f"--{name.replace('_', '-')}" for name in own)
                raise UsageError(f"{options} are for --precision {precision}, not {asked}")
