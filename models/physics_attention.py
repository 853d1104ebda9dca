"""Attention read as physics: interactions at a temperature, with locality and causality, whose weights are a Boltzmann distribution.

There is no paper; this is the survey's `PhysicsInspiredAttention`. For each head, with token i reading token j of the queries, keys and
values of d channels, temperature T, decay length l and radius R::

    E_ij = -q_i k_j / sqrt(d)                             the interaction
    m_ij = exp(-|i - j| / l) [|i - j| <= R] [j <= i]      locality and the arrow of time
    A_ij = m_ij exp(-E_ij / T) / sum_j m_ij exp(-E_ij / T)
    y_i  = sum_j A_ij v_j

The heads' fields are superposed: the output projection of all of them is the sum of one projection for each.

What differs from the sketch, and why: it multiplies the weights by its masks after the softmax, so that rows no longer sum to 1, which
its own table asks for (energy conservation). Here the masks are inside the sum, as their logarithms on the scores. Each token may read
itself, so that no row is empty. The sketch divides by the root of all channels though heads have fewer; here it is the root of a head's,
which T can make up for. Its function for the distance is not given; the exponential and the radius are inferred. So are the projections,
which it leaves out. The table's action and reaction (F_ij = -F_ji) holds for no attention with a softmax and is not attempted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..exporter.spec import Analysis, ModelSpec, SizeRange, register_model


@dataclass(frozen=True)
class PhysicsAttentionConfig:
    """Settings of a block of physics-inspired attention.

    Attributes:
        hidden_size: Channels of a token, a multiple of `num_heads`.
        num_heads: Number of heads.
        temperature: T to begin with; it is learned, and must stay positive.
        decay_length: l, tokens over which the weight of a distance falls to 1 / e; 0 for no decay.
        radius: R, the farthest that a token reads; 0 for itself alone, -1 for no limit.
        causal: A token reads itself and those before it.
    """

    hidden_size: int = 512
    num_heads: int = 8
    temperature: float = 1.0
    decay_length: float = 64.0
    radius: int = -1
    causal: bool = True

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.hidden_size < 1 or self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be a positive multiple of num_heads, got {self.hidden_size} and {self.num_heads}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not self.decay_length >= 0:
            raise ValueError(f"decay_length must be at least 0, got {self.decay_length}")
        if self.radius < -1:
            raise ValueError(f"radius must be at least 0, or -1 for none, got {self.radius}")


class PhysicsAttention(nn.Module):
    """The block (see the module's text for the formulas)."""

    def __init__(self, config: PhysicsAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.temperature = nn.Parameter(torch.full((1,), config.temperature))
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes tokens.

        Args:
            x: (B, L, hidden_size).

        Returns:
            y (B, L, hidden_size), and the weights A (B, num_heads, L, L), whose rows sum to 1.
        """
        heads = (layer(x).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = heads
        scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[-1])) / self.temperature
        places = torch.arange(x.shape[1], device=x.device)
        behind = places[:, None] - places[None, :]  # i - j
        distance = behind.abs()
        if self.config.decay_length:
            scores = scores - distance * (1 / self.config.decay_length)
        forbidden = []
        if self.config.radius >= 0:
            forbidden.append(distance > self.config.radius)
        if self.config.causal:
            forbidden.append(behind < 0)
        for mask in forbidden:
            scores = scores.masked_fill(mask, -torch.inf)
        weights = scores.softmax(dim=-1)
        y: Tensor = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return y, weights


@register_model(
    "physics-attention-tiny",
    PhysicsAttentionConfig(hidden_size=32, num_heads=2, temperature=0.7, decay_length=4.0, radius=8),
    summary="Physics-inspired attention with 2 heads, causal and local, for trying",
)
@register_model(
    "physics-attention-base",
    PhysicsAttentionConfig(),
    summary="Physics-inspired attention of the base Transformer's size, 8 heads of 64",
)
def physics_attention(config: PhysicsAttentionConfig) -> ModelSpec:
    """A block of physics-inspired attention."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(rng.standard_normal((sizes["batch"], sizes["length"], config.hidden_size), dtype=np.float32))}

    return ModelSpec(
        build=lambda: PhysicsAttention(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "length": 12},
        dynamic={"x": {0: "batch", 1: "length"}},
        ranges={"batch": SizeRange(1, 2, 16), "length": SizeRange(1, 12, 4096)},
        outputs=("y", "weights"),
        source="defined in this file, after the PhysicsInspiredAttention of the survey in docs/design/0010; no paper",
        analyses=(Analysis("constraint", outputs=("weights",)),),
    )
