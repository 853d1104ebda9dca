"""RMSNorm: tokens divided by their root mean square (Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467).

For a token a of n channels, with one learned gain a channel (equation 4 of the paper)::

    RMS(a) = sqrt(1/n sum_i a_i^2)        y_i = a_i / RMS(a) * g_i

The paper has no epsilon. The authors' two implementations place it differently (bzhangGo/rmsnorm: a / (RMS + eps) in PyTorch, a /
sqrt(RMS^2 + eps) in TensorFlow), and so does the survey's sketch, which follows the first. Here it is under the root, as in Llama, T5,
`torch.nn.RMSNorm` and ONNX' RMSNormalization: the two differ by a factor of about 1 - eps / RMS, or 1 - eps / (2 RMS^2), and only the
second has a gradient at a = 0. The paper's partial form (pRMSNorm, the mean over the first channels only) and the bias of the authors'
PyTorch code, off by default there, are left out.

The module is `layers.RMSNorm`, which Llama's, Mixtral's and Jamba's blocks use. Checked against transformers' LlamaRMSNorm; 4096 channels
and an epsilon of 1e-5 are those of Llama-2-7B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, register_model
from .layers import RMSNorm


@dataclass(frozen=True)
class RMSNormConfig:
    """Settings of an RMSNorm.

    Attributes:
        dim: Channels of a token.
        eps: Added to the mean square.
    """

    dim: int = 4096
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be between 0 and 1, got {self.eps}")


def _build(config: RMSNormConfig) -> nn.Module:
    module = RMSNorm(config.dim, config.eps)
    # The paper starts at 1. Random gains here, because gains of 1 would hide a target that leaves them out.
    nn.init.uniform_(module.weight, 0.5, 1.5)
    return module.eval()


@register_model("rmsnorm-tiny", RMSNormConfig(dim=32), summary="RMSNorm over 32 channels, for trying")
@register_model("rmsnorm-4096", RMSNormConfig(), summary="RMSNorm over 4096 channels, as in Llama-2-7B")
def rmsnorm(config: RMSNormConfig) -> ModelSpec:
    """An RMSNorm over tokens (B, L, dim)."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        # Tokens of magnitudes from 0.1 to 10: the norm is what makes them alike.
        shape = (sizes["batch"], sizes["length"])
        magnitudes = 10 ** rng.uniform(-1, 1, (*shape, 1))
        return {"x": torch.from_numpy((magnitudes * rng.standard_normal((*shape, config.dim))).astype(np.float32))}

    return ModelSpec(
        build=lambda: _build(config),
        inputs=inputs,
        sizes={"batch": 2, "length": 6},
        dynamic={"x": {0: "batch", 1: "length"}},
        ranges={"batch": SizeRange(1, 2, 64), "length": SizeRange(1, 6, 4096)},
        outputs=("y",),
        source="Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467; checked against transformers' LlamaRMSNorm",
    )
