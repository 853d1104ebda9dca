"""Pooling: windows that reach beyond the border, dilated windows, divisors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....exporter.windows import beyond, in_torch_order, sizes
from . import decomposition

aten = torch.ops.aten


def _averages(operator: Any, rank: int) -> None:
    def apply(
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        kernel, pads = sizes(kernel_size, rank), sizes(padding, rank)
        strides = sizes(stride, rank) if len(stride) else kernel
        if x.dim() != rank + 2:
            rest = (kernel, strides, pads, ceil_mode, count_include_pad)
            return _pool(operator, x.unsqueeze(0), rest, divisor_override).squeeze(0)
        ends = [beyond(n, k, s, p, ceil_mode) for n, k, s, p in zip(x.shape[2:], kernel, strides, pads, strict=True)]
        if not any(ends) and divisor_override is None:
            return _pool(operator, x, (kernel, strides, pads, False, count_include_pad)) if ceil_mode else NotImplemented
        padded = F.pad(x, in_torch_order(pads, [p + e for p, e in zip(pads, ends, strict=True)]))
        mean = _pool(operator, padded, (kernel, strides, [0] * rank, False, True))
        if divisor_override is not None:
            return mean * (math.prod(kernel) / divisor_override)
        counted = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
        counted = F.pad(counted, in_torch_order(pads, pads), value=1.0 if count_include_pad else 0.0)
        counted = F.pad(counted, in_torch_order([0] * rank, ends))
        return mean / _pool(operator, counted, (kernel, strides, [0] * rank, False, True))

    apply.__doc__ = """As coremltools divides a window that reaches beyond the border by the wrong count, and has no `divisor_override`.

    The mean of a window that holds zeros is divided by the share of it that counts: the mean of a mask of ones.
    """
    decomposition(operator)(apply)


def _pool(operator: Any, x: Tensor, rest: tuple[Any, ...], divisor: int | None = None) -> Any:
    return operator(x, *rest) if operator is aten.avg_pool1d.default else operator(x, *rest, divisor)


for _rank, _operator in ((1, aten.avg_pool1d.default), (2, aten.avg_pool2d.default), (3, aten.avg_pool3d.default)):
    _averages(_operator, _rank)


def _maxima(operator: Any, rank: int) -> None:
    def apply(
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> Any:
        kernel, pads, dilations = sizes(kernel_size, rank), sizes(padding, rank), sizes(dilation, rank)
        strides = sizes(stride, rank) if len(stride) else kernel
        if x.dim() != rank + 2:
            return operator(x.unsqueeze(0), kernel, strides, pads, dilations, ceil_mode).squeeze(0)
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
        ends = [beyond(n, w, s, p, ceil_mode) for n, w, s, p in zip(x.shape[2:], spans, strides, pads, strict=True)]
        if max(dilations) == 1 and not any(ends):
            return NotImplemented if len(stride) and not ceil_mode else operator(x, kernel, strides, pads, dilations, False)
        if any(pads) or any(ends):
            x = F.pad(x, in_torch_order(pads, [p + e for p, e in zip(pads, ends, strict=True)]), value=-torch.inf)
        if max(dilations) == 1:
            return operator(x, kernel, strides, [0] * rank, dilations, False)
        # The largest of what each element of the window meets at every place.
        found: Any = None
        counts = [(n - w) // s + 1 for n, w, s in zip(x.shape[2:], spans, strides, strict=True)]
        for tap in product(*(range(k) for k in kernel)):
            met = x
            for axis, (t, d, s, count) in enumerate(zip(tap, dilations, strides, counts, strict=True), start=2):
                met = aten.slice.Tensor(met, axis, t * d, t * d + (count - 1) * s + 1, s)
            found = met if found is None else torch.maximum(found, met)
        return found

    apply.__doc__ = "As coremltools refuses dilations and a stride that is left out, and counts windows beyond the border by its own rules."
    decomposition(operator)(apply)


for _rank, _operator in ((1, aten.max_pool1d.default), (2, aten.max_pool2d.default), (3, aten.max_pool3d.default)):
    _maxima(_operator, _rank)


@decomposition(aten.adaptive_avg_pool3d.default)
def adaptive_avg_pool3d(x: Tensor, output_size: Sequence[int]) -> Any:
    """As coremltools has none. Along one axis after the other: windows from floor(i n / size) to ceil((i + 1) n / size) (torch's
    AdaptiveAveragePooling.cpp).
    """
    for axis, size in enumerate(sizes(output_size, 3), start=x.dim() - 3):
        n = x.shape[axis]
        if not isinstance(n, int):
            return NotImplemented
        if size is not None and size != n:
            windows = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
            x = torch.cat([x.narrow(axis, a, b - a).mean(axis, keepdim=True) for a, b in windows], axis)
    return x.clone()
