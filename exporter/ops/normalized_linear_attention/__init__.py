"""Linear attention that is not causal, with the ReLU features and the normaliser of SANA (arXiv:2410.10629) and EfficientViT (2205.14756).

For each batch and head, with phi(x) = max(x, 0), over all tokens at once::

    y_t = phi(q_t) (sum_s phi(k_s) v_s^T) / (phi(q_t) (sum_s phi(k_s)) + eps)

The epsilon is what keeps a row whose features are all zero from being 0 / 0: it is part of the operator in every dtype, and sums are
float32, because neither 1e-15 nor the sums of long sequences are float16 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from ...errors import Reason
from ...op import Argument, Attribute, CustomOp, Form, register_op


@register_op("normalized_linear_attention", summary="SANA's linear attention: not causal, ReLU features, normalised")
class NormalizedLinearAttention(CustomOp):
    """See the module's text."""

    inputs: ClassVar[tuple[Argument, ...]] = (
        Argument("q", ("batch", "length", "num_heads*key")),
        Argument("k", ("batch", "tokens", "num_heads*key")),
        Argument("v", ("batch", "tokens", "num_heads*value")),
    )
    outputs: ClassVar[tuple[Argument, ...]] = (Argument("y", ("batch", "length", "num_heads*value")),)
    attributes: ClassVar[tuple[Attribute, ...]] = (Attribute("num_heads", int), Attribute("eps", float, 1e-15))
    forms: ClassVar[tuple[Form, ...]] = (Form("NormalizedLinearAttention", ("q", "k", "v")),)
    lacks: ClassVar[Mapping[str, str]] = {"onnx27": "the standard LinearAttention is causal; plain matrix products are the standard form"}

    def sizes(self, attributes: Mapping[str, Any]) -> dict[str, int]:
        """The number of heads."""
        return {"num_heads": attributes["num_heads"]}

    def constraints(self, sizes: Mapping[str, int], given: frozenset[str], attributes: Mapping[str, Any]) -> Iterator[Reason]:
        """A negative epsilon could make the normaliser zero."""
        if not attributes["eps"] >= 0.0:
            yield Reason(f"got {attributes['eps']}, expected a number of at least 0", where="eps")

    def form(self, given: frozenset[str], attributes: Mapping[str, Any]) -> Form:
        """There is one."""
        return self.forms[0]
