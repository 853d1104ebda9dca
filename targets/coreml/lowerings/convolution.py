"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....exporter.windows import in_torch_order, sizes
from . import decomposition

aten = torch.ops.aten


def _without_batch(operator: Any, rank: int) -> None:
    def apply(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Any:
        if x.dim() == rank + 2:
            return NotImplemented
        return operator(x.unsqueeze(0), weight, bias, *rest).squeeze(0)

    apply.__doc__ = "As coremltools takes the channels for the batch where there is no batch."
    decomposition(operator)(apply)


for _rank, _name in ((1, "conv1d"), (2, "conv2d"), (3, "conv3d")):
    _without_batch(getattr(aten, _name).default, _rank)
    _without_batch(getattr(aten, _name).padding, _rank)


def _transposed(operator: Any, rank: int) -> None:
    def apply(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        output_padding: Sequence[int] = (0,),
        groups: int = 1,
        dilation: Sequence[int] = (1,),
    ) -> Any:
        if x.dim() != rank + 2:
            return operator(x.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation).squeeze(0)
        pads, more = sizes(padding, rank), sizes(output_padding, rank)
        if not any(more) or (rank < 3 and all(m <= p for m, p in zip(more, pads, strict=True))):
            return NotImplemented
        # All that the kernel reaches; what the padding cuts off, and what is added at the end, which no element reaches.
        y = operator(x, weight, None, sizes(stride, rank), [0] * rank, [0] * rank, groups, sizes(dilation, rank))
        y = F.pad(y, in_torch_order([-p for p in pads], [m - p for m, p in zip(more, pads, strict=True)]))
        return y if bias is None else y + bias.reshape([-1] + [1] * rank)

    apply.__doc__ = "As coremltools computes a size of its own, or fails, where `output_padding` is larger than `padding`."
    decomposition(operator)(apply)


_transposed(aten.conv_transpose1d.default, 1)
_transposed(aten.conv_transpose2d.input, 2)
_transposed(aten.conv_transpose3d.input, 3)
