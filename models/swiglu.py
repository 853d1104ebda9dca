"""SwiGLU: the feed-forward layer with a Swish-gated linear unit (Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202).

Equation 6 of the paper, without biases as everywhere in its section 2::

    FFN_SwiGLU(x, W, V, W2) = (Swish_1(x W) * x V) W2        Swish_1(x) = x sigmoid(x), also called SiLU

W and V map d channels to h, W2 maps h back to d. With h = 2/3 * 4 d it has as many weights as a plain layer of 4 d; Llama rounds that up to
a multiple of 256, which for d = 4096 is 11008. The survey's sketch fuses W and V into one layer of 2 d (so h = d), declares a W2 from d to
d and never applies it: that is a gated linear unit without its output projection, and not this layer.

The module is `layers.SwiGLU`, which Mixtral's, DBRX's and Jamba's experts compute too. Checked against transformers' LlamaMLP, whose names
are the module's; Meta's checkpoints call the three w1, w3 and w2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model
from .layers import SwiGLU


@dataclass(frozen=True)
class SwiGLUConfig:
    """Settings of a SwiGLU layer.

    Attributes:
        dim: Channels of a token.
        hidden_dim: Channels between the layers.
    """

    dim: int = 4096
    hidden_dim: int = 11008

    def __post_init__(self) -> None:
        for name in ("dim", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


_META_NAMES = {"w1.weight": "gate_proj.weight", "w3.weight": "up_proj.weight", "w2.weight": "down_proj.weight"}


def _from_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_META_NAMES.get(key, key): state[key] for key in state}


@register_model("swiglu-tiny", SwiGLUConfig(dim=32, hidden_dim=88), summary="SwiGLU layer of width 32, for trying")
@register_model("swiglu-llama-7b", SwiGLUConfig(), summary="SwiGLU layer of Llama 7B, 4096 to 11008 to 4096, 135 M parameters")
def swiglu(config: SwiGLUConfig) -> ModelSpec:
    """A SwiGLU layer over tokens (B, L, dim)."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(rng.standard_normal((sizes["batch"], sizes["length"], config.dim), dtype=np.float32))}

    return ModelSpec(
        build=lambda: SwiGLU(config.dim, config.hidden_dim).eval(),
        inputs=inputs,
        sizes={"batch": 2, "length": 6},
        dynamic={"x": {0: "batch", 1: "length"}},
        ranges={"batch": SizeRange(1, 2, 64), "length": SizeRange(1, 6, 4096)},
        outputs=("y",),
        source="Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202; checked against transformers' LlamaMLP",
        layouts=(StateDictLayout("meta-llama", lambda keys: "w1.weight" in keys, _from_meta),),
    )
