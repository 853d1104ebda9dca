"""The depthwise causal convolution that stands before a selective scan, with its carry, as ONNX's `CausalConvWithState` (opset 27).

For each batch and channel, with s the initial state (the width - 1 inputs before the first) or 0, and p = [s, x]::

    y_t = bias + sum_{j < width} weight_j p_{t + j}      then y_t sigmoid(y_t) with `silu`
    last_state = the last width - 1 of p

Layouts are the standard's: channels first, (batch, channels, length), and the weight is that of a `Conv` with group = channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from ...errors import Reason
from ...op import Argument, Attribute, CustomOp, Form, register_op

_ACTIVATION = ("batch", "channels", "length")
_STATE = ("batch", "channels", "width-1")


@register_op("causal_conv1d", summary="depthwise causal convolution with carry and SiLU")
class CausalConv1d(CustomOp):
    """See the module's text. Bias and initial state are zeros in the node when they are not given."""

    inputs: ClassVar[tuple[Argument, ...]] = (
        Argument("x", _ACTIVATION),
        Argument("weight", ("channels", 1, "width")),
        Argument("bias", ("channels",), optional=True),
        Argument("initial_state", _STATE, optional=True),
    )
    outputs: ClassVar[tuple[Argument, ...]] = (Argument("y", _ACTIVATION), Argument("last_state", _STATE))
    attributes: ClassVar[tuple[Attribute, ...]] = (Attribute("silu", bool, False),)
    forms: ClassVar[tuple[Form, ...]] = (Form("CausalConv1d", ("x", "weight", "bias", "initial_state")),)

    def constraints(self, sizes: Mapping[str, int], given: frozenset[str], attributes: Mapping[str, Any]) -> Iterator[Reason]:
        """With a width of 1 there is no carry, and an empty tensor is nothing that the targets take."""
        if sizes["width"] < 2:
            yield Reason(f"has width {sizes['width']}, expected at least 2", where="weight", fix="multiply by the weight instead")

    def form(self, given: frozenset[str], attributes: Mapping[str, Any]) -> Form:
        """There is one."""
        return self.forms[0]
