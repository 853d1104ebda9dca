"""The Core ML lowering of linear attention: chunks of tokens with matrix products; see `exporter.ops.mil_recurrence`."""

from __future__ import annotations

from typing import Any

from ...op import OPS
from ..mil import Var, mb, register_lowering, sizes
from ..mil_recurrence import recurrence


def _lower(inputs: dict[str, Var], attributes: dict[str, Any]) -> tuple[Var, Var]:
    heads, rule = attributes["kv_num_heads"], attributes["update_rule"]
    k, v = inputs["k"], inputs["v"]
    key = sizes(k)[2] // heads
    q = mb.mul(x=inputs["q"], y=attributes["scale"] or key**-0.5)
    g = inputs["decay"] if "gated" in rule else None
    a = b = None
    if "delta" in rule:
        # As in the CPU kernel: what is read is the decayed state, what is written has beta as a factor.
        beta = mb.expand_dims(x=inputs["beta"], axes=[3])
        a = k if g is None else _over_heads(k, mb.exp(x=_heads(g, heads)), heads)
        k = _over_heads(k, beta, heads)
        b = mb.mul(x=k, y=-1.0)
    return recurrence(q, k, v, g, a, b, inputs.get("initial_state"), heads=heads, repeats=attributes["q_num_heads"] // heads)


def _heads(x: Var, heads: int) -> Var:
    batch, length, width = sizes(x)
    return mb.reshape(x=x, shape=[batch, length, heads, width // heads])


def _over_heads(x: Var, factor: Var, heads: int) -> Var:
    """(batch, length, heads * width) times (batch, length, heads or 1, width or 1)."""
    return mb.reshape(x=mb.mul(x=_heads(x, heads), y=factor), shape=sizes(x))


register_lowering(OPS["linear_attention"], _lower)
