"""Mamba-1's selective scan (Gu and Dao, arXiv:2312.00752, section 3), with the arguments of the authors' `selective_scan_fn`.

For each batch, channel d and state n, with g the group of channel d, and h_{-1} the initial state or 0::

    delta'_t  = delta_t + delta_bias            then softplus(delta'_t) with `delta_softplus`
    h_t[d, n] = exp(delta'_t[d] A[d, n]) h_{t-1}[d, n] + delta'_t[d] u_t[d] B_t[g, n]
    y_t[d]    = sum_n C_t[g, n] h_t[d, n] + D[d] u_t[d]
    y_t[d]    = y_t[d] z_t[d] sigmoid(z_t[d])   with `z`

With `reverse` the tokens are visited from the last to the first: the result is that of flipped inputs, flipped back. B is discretised by
Euler's rule, as in the authors' code. Layouts are tokens first, (batch, length, channels): the authors' are channels first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from ...errors import Reason
from ...op import Argument, Attribute, CustomOp, Form, register_op

_ACTIVATION = ("batch", "length", "channels")
_MATRIX = ("batch", "length", "groups*state")
_STATE = ("batch", "channels", "state")
_PLAIN = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")


@register_op("selective_scan", summary="Mamba-1: state space scan with input-dependent step, input and output matrices")
class SelectiveScan(CustomOp):
    """See the module's text.

    `z` has no neutral value, so that it has a form of its own; D, delta_bias and the initial state are zeros in the node when they are
    not given.
    """

    inputs: ClassVar[tuple[Argument, ...]] = (
        Argument("u", _ACTIVATION),
        Argument("delta", _ACTIVATION),
        Argument("A", ("channels", "state"), wide=True),
        Argument("B", _MATRIX),
        Argument("C", _MATRIX),
        Argument("D", ("channels",), wide=True, optional=True),
        Argument("z", _ACTIVATION, optional=True),
        Argument("delta_bias", ("channels",), wide=True, optional=True),
        Argument("initial_state", _STATE, wide=True, optional=True),
    )
    outputs: ClassVar[tuple[Argument, ...]] = (Argument("y", _ACTIVATION), Argument("last_state", _STATE, wide=True))
    attributes: ClassVar[tuple[Attribute, ...]] = (Attribute("delta_softplus", bool, False), Attribute("reverse", bool, False))
    forms: ClassVar[tuple[Form, ...]] = (Form("SelectiveScan", _PLAIN), Form("GatedSelectiveScan", (*_PLAIN, "z")))

    def constraints(self, sizes: Mapping[str, int], given: frozenset[str], attributes: Mapping[str, Any]) -> Iterator[Reason]:
        """Each group serves as many channels as every other."""
        if sizes["channels"] % sizes["groups"]:
            yield Reason(f"has {sizes['groups']} groups of {sizes['state']}, which do not divide {sizes['channels']} channels", where="B")

    def form(self, given: frozenset[str], attributes: Mapping[str, Any]) -> Form:
        """With or without the gate."""
        return self.forms["z" in given]
