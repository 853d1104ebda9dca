"""Padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import decomposition

aten = torch.ops.aten


@decomposition(aten.pad.default, aten.constant_pad_nd.default)
def pad(x: Tensor, widths: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """As coremltools has no circular padding, cuts nothing off, and pads numbers of floating point alone.

    Called as `constant_pad_nd`, the third argument is the value.
    """
    if not isinstance(mode, str):
        mode, value = "constant", mode
    if mode == "constant":
        return _constant(x, list(widths), 0.0 if value is None else value)
    pairs = _pairs(widths)
    if mode == "circular":
        for axis, (before, after) in pairs:
            size = x.shape[axis]
            whole = [x] if before >= 0 else [x.narrow(axis, -before, size + before)]
            parts = ([x.narrow(axis, size - before, before)] if before > 0 else []) + whole
            x = torch.cat(parts + ([x.narrow(axis, 0, after)] if after > 0 else []), axis)
        return x
    if len(pairs) <= 2:
        return NotImplemented
    # MIL reflects and repeats along two axes at most.
    for axis, (before, after) in pairs:
        last = x.movedim(axis, -1)
        row = aten.pad.default(last.reshape(1, -1, last.shape[-1]), [before, after], mode)
        x = row.reshape([*last.shape[:-1], row.shape[-1]]).movedim(-1, axis)
    return x


def _constant(x: Tensor, widths: list[int], value: Any) -> Any:
    if x.dtype == torch.bool:
        return aten.pad.default(x.to(torch.float32), widths, "constant", float(value)) != 0
    if min(widths, default=0) >= 0:
        return NotImplemented if x.is_floating_point() else _concatenated(x, widths, value)
    for axis, (before, after) in _pairs(widths):
        x = aten.slice.Tensor(x, axis, max(-before, 0), x.shape[axis] + min(after, 0))
    return aten.pad.default(x, [max(width, 0) for width in widths], "constant", value)


def _concatenated(x: Tensor, widths: Sequence[int], value: Any) -> Tensor:
    for axis, (before, after) in _pairs(widths):
        for width, behind in ((before, False), (after, True)):
            if width:
                shape = [width if i == axis % x.dim() else size for i, size in enumerate(x.shape)]
                more = torch.full(shape, value, dtype=x.dtype)
                x = torch.cat([x, more] if behind else [more, x], axis)
    return x


def _pairs(widths: Sequence[int]) -> list[tuple[int, tuple[int, int]]]:
    """(axis from the end, (before, after)); the last axis comes first in `widths`."""
    return [(-1 - i, (widths[2 * i], widths[2 * i + 1])) for i in range(len(widths) // 2)]
