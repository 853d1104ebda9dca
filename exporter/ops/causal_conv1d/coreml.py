"""The Core ML lowering of the causal convolution: a depthwise `conv` over the carry and the inputs.

Weights that are no constants cannot be a `conv`'s on the Neural Engine; they make one product and sum for each of their `width` elements.

In float16 y reaches 69 to 83 dB: it is rounded once by the convolution and twice by SiLU, so that float32 inside would gain nothing that
the rounding of y does not take back. The last state is exact.
"""

from __future__ import annotations

from typing import Any

from ...op import OPS
from ..mil import Var, cut, mb, pad, register_lowering, sizes


def _lower(inputs: dict[str, Var], attributes: dict[str, Any]) -> tuple[Var, Var]:
    x, weight = inputs["x"], inputs["weight"]
    _, channels, length = sizes(x)
    carry = sizes(weight)[2] - 1
    state = inputs.get("initial_state")
    padded = mb.concat(values=[state, x], axis=2) if state is not None else pad(x, 2, before=carry)
    bias = inputs.get("bias")
    if weight.val is not None and (bias is None or bias.val is not None):
        y = mb.conv(x=padded, weight=weight, bias=bias, groups=channels, pad_type="valid")
    else:
        weights = mb.squeeze(x=weight, axes=[1])  # (channels, width)
        y = mb.expand_dims(x=bias, axes=[1]) if bias is not None else None
        for i in range(carry + 1):
            term = mb.mul(x=cut(padded, 2, i, i + length), y=cut(weights, 1, i, i + 1))
            y = term if y is None else mb.add(x=y, y=term)
    if attributes["silu"]:
        y = mb.silu(x=y)
    return y, cut(padded, 2, length, length + carry)


register_lowering(OPS["causal_conv1d"], _lower)
