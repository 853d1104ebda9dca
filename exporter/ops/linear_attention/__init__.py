"""Causal linear attention with a matrix state, with the semantics of ONNX's `LinearAttention` (opset 27).

For each batch and head, with the state S (key, value), S_{-1} the initial state or 0, and the rules in the order of their papers::

    linear       S_t = S_{t-1} + k_t v_t^T
    gated        S_t = exp(decay_t) S_{t-1} + k_t v_t^T
    delta        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
    gated_delta  S_t = exp(decay_t) S_{t-1} + beta_t k_t (v_t - (exp(decay_t) S_{t-1})^T k_t)^T

    y_t = scale S_t^T q_t

decay is a logarithm, at most 0: one number a head, or one a key channel, which multiplies that row of S. q has `q_num_heads` heads, k, v,
decay and beta have `kv_num_heads`; each of these serves q_num_heads / kv_num_heads consecutive heads of q. A scale of 0 stands for
1 / sqrt(key size), as in the standard. Where the standard's text leaves the order of decay and removal open for a decay per key channel,
the decayed state is what is read.

Sources: arXiv:2006.16236 (linear); RetNet, 2307.08621, GLA, 2312.06635, and Mamba-2, 2405.21060 (gated); 2406.06484 (delta); 2412.06464
(gated delta).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from ...errors import Reason
from ...op import Argument, Attribute, CustomOp, Form, register_op

RULES = ("linear", "gated", "delta", "gated_delta")
_STATE = ("batch", "kv_num_heads", "key", "value")
_PLAIN = ("q", "k", "v", "initial_state")


@register_op("linear_attention", summary="causal linear attention: linear, gated, delta and gated delta rules, grouped heads")
class LinearAttention(CustomOp):
    """See the module's text. The initial state is zeros in the node when it is not given.

    No form is called `LinearAttention`: TensorRT's parser takes a node of that name for the standard's, whatever its domain is.
    """

    inputs: ClassVar[tuple[Argument, ...]] = (
        Argument("q", ("batch", "length", "q_num_heads*key")),
        Argument("k", ("batch", "length", "kv_num_heads*key")),
        Argument("v", ("batch", "length", "kv_num_heads*value")),
        Argument("decay", ("batch", "length", "kv_num_heads*decays"), optional=True),
        Argument("beta", ("batch", "length", "betas"), optional=True),
        Argument("initial_state", _STATE, wide=True, optional=True),
    )
    outputs: ClassVar[tuple[Argument, ...]] = (
        Argument("y", ("batch", "length", "q_num_heads*value")),
        Argument("last_state", _STATE, wide=True),
    )
    attributes: ClassVar[tuple[Attribute, ...]] = (
        Attribute("q_num_heads", int),
        Attribute("kv_num_heads", int),
        Attribute("update_rule", str),
        Attribute("scale", float, 0.0),
    )
    forms: ClassVar[tuple[Form, ...]] = (
        Form("PlainLinearAttention", _PLAIN, {"update_rule": "linear"}),
        Form("GatedLinearAttention", (*_PLAIN, "decay"), {"update_rule": "gated"}),
        Form("DeltaLinearAttention", (*_PLAIN, "beta"), {"update_rule": "delta"}),
        Form("GatedDeltaLinearAttention", (*_PLAIN, "decay", "beta"), {"update_rule": "gated_delta"}),
    )

    def sizes(self, attributes: Mapping[str, Any]) -> dict[str, int]:
        """The numbers of heads."""
        return {name: attributes[name] for name in ("q_num_heads", "kv_num_heads")}

    def constraints(self, sizes: Mapping[str, int], given: frozenset[str], attributes: Mapping[str, Any]) -> Iterator[Reason]:
        """The rule has what it needs and no more; heads are grouped evenly; decay and beta have one of their two widths."""
        rule = attributes["update_rule"]
        if rule not in RULES:
            yield Reason(f"got {rule!r}, expected one of {', '.join(RULES)}", where="update_rule")
            return
        for name, needed in (("decay", "gated" in rule), ("beta", "delta" in rule)):
            if needed != (name in given):
                yield Reason(f"the rule {rule!r} {'needs it' if needed else 'has none'}", where=name)
        if sizes["q_num_heads"] % sizes["kv_num_heads"]:
            yield Reason(f"{sizes['q_num_heads']} is not a multiple of kv_num_heads = {sizes['kv_num_heads']}", where="q_num_heads")
        if "decay" in given and sizes["decays"] not in (1, sizes["key"]):
            yield Reason(f"has {sizes['decays']} numbers a head, expected 1 or {sizes['key']}", where="decay")
        if "beta" in given and sizes["betas"] not in (1, sizes["kv_num_heads"]):
            yield Reason(f"has {sizes['betas']} on axis 2, expected 1 or {sizes['kv_num_heads']}", where="beta")

    def form(self, given: frozenset[str], attributes: Mapping[str, Any]) -> Form:
        """One for each rule."""
        return self.forms[RULES.index(attributes["update_rule"])]
