"""The time mixing of RWKV-7 (Peng et al., arXiv:2503.14456): a decay per channel, and a removal key apart from the write key.

For each batch and head, with the state S (key, value), the transpose of the paper's, and S_{-1} the initial state or 0::

    S_t = exp(decay_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
    y_t = S_t^T r_t

decay is a logarithm, at most 0, one number a key channel; it multiplies that row of S. In the paper's terms decay = -exp(w), a = -kappa and
b = kappa * in-context learning rate. No update rule of ONNX's LinearAttention has two keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from ...errors import Reason
from ...op import Argument, Attribute, CustomOp, Form, register_op

_KEYS = ("batch", "length", "num_heads*key")
_VALUES = ("batch", "length", "num_heads*value")
_STATE = ("batch", "num_heads", "key", "value")


@register_op("rwkv7", summary="RWKV-7's time mixing: decay per channel, removal key apart from the write key")
class RWKV7(CustomOp):
    """See the module's text. The initial state is zeros in the node when it is not given."""

    inputs: ClassVar[tuple[Argument, ...]] = (
        Argument("r", _KEYS),
        Argument("decay", _KEYS),
        Argument("k", _KEYS),
        Argument("v", _VALUES),
        Argument("a", _KEYS),
        Argument("b", _KEYS),
        Argument("initial_state", _STATE, wide=True, optional=True),
    )
    outputs: ClassVar[tuple[Argument, ...]] = (Argument("y", _VALUES), Argument("last_state", _STATE, wide=True))
    attributes: ClassVar[tuple[Attribute, ...]] = (Attribute("num_heads", int),)
    forms: ClassVar[tuple[Form, ...]] = (Form("RWKV7", ("r", "decay", "k", "v", "a", "b", "initial_state")),)
    lacks: ClassVar[Mapping[str, str]] = {
        "onnx27": "no update rule of the standard LinearAttention has a removal key apart from the write key"
    }

    def sizes(self, attributes: Mapping[str, Any]) -> dict[str, int]:
        """The number of heads."""
        return {"num_heads": attributes["num_heads"]}

    def constraints(self, sizes: Mapping[str, int], given: frozenset[str], attributes: Mapping[str, Any]) -> Iterator[Reason]:
        """None beyond the shapes."""
        return iter(())

    def form(self, given: frozenset[str], attributes: Mapping[str, Any]) -> Form:
        """There is one."""
        return self.forms[0]
