"""The Core ML lowering of RWKV-7's time mixing: chunks of tokens with matrix products; see `exporter.ops.mil_recurrence`."""

from __future__ import annotations

from typing import Any

from ...op import OPS
from ..mil import Var, register_lowering
from ..mil_recurrence import recurrence


def _lower(inputs: dict[str, Var], attributes: dict[str, Any]) -> tuple[Var, Var]:
    r, g, k, v, a, b = (inputs[name] for name in ("r", "decay", "k", "v", "a", "b"))
    return recurrence(r, k, v, g, a, b, inputs.get("initial_state"), heads=attributes["num_heads"])


register_lowering(OPS["rwkv7"], _lower)
