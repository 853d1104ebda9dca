"""Multi-head softmax attention (Vaswani et al., arXiv:1706.03762), with grouped queries and rotary positions where they are wanted.

For each head, with the queries Q, keys K and values V (L, d) of the tokens and the causal mask M (0 where m <= n, else minus infinity)::

    y = softmax(Q K^T / sqrt(d) + M) V

The survey's formula is this with one head and without M. Grouped queries (GQA, Ainslie et al., arXiv:2305.13245): each head of keys and
values serves num_heads / num_kv_heads consecutive heads of queries. Rotary positions (RoPE, Su et al., arXiv:2104.09864): before the
products, channel pair i of the query and key at position n is turned by n * base^(-2 i / d). The pairs are (i, i + d / 2), as in the
published Llama weights of transformers; Meta's own files pair (2 i, 2 i + 1), which is the same network with permuted rows of q_proj and
k_proj. Angles are tabulated in float64 up to `max_length` positions, so that no target multiplies a position by a frequency in half
precision.

There are two forms with the same weights: over a sequence, which for causal attention returns the keys and values too, and a step, which
takes one token and the keys and values of those before it (contiguous, with their positions already applied) and returns them with its own
appended. Where the cache is kept in pages, see the model `paged-attention`.

Parameters have the names of transformers' LlamaAttention, against which this is checked. The block is attention alone: norms, residual and
feed-forward layer are the networks'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import Analysis, ModelSpec, SizeRange, register_model
from .layers import rotary_table, tokens_reversed


@dataclass(frozen=True)
class SoftmaxAttentionConfig:
    """Settings of a block of softmax attention.

    Attributes:
        hidden_size: Channels of a token.
        num_heads: Heads of queries.
        num_kv_heads: Heads of keys and values; divides `num_heads`.
        head_dim: Channels of a head; even where positions are rotary.
        causal: A token sees itself and those before it, and the cache is returned; otherwise a token sees all.
        rope_base: Base of the rotary frequencies; 0 for no rotary positions.
        max_length: Positions in the table of angles, and the longest sequence.
        bias: The four projections have biases.
        form: "sequence", or "step" for one token and a cache.
    """

    hidden_size: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    causal: bool = True
    rope_base: float = 500000.0
    max_length: int = 8192
    bias: bool = False
    form: str = "sequence"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length < 8:
            raise ValueError(f"max_length must be at least 8, the length of the examples, got {self.max_length}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}")
        if self.rope_base < 0 or (self.rope_base and self.head_dim % 2):
            raise ValueError(
                f"rope_base must be 0, or positive with an even head_dim, got rope_base={self.rope_base}, head_dim={self.head_dim}"
            )
        if self.form not in ("sequence", "step"):
            raise ValueError(f"form must be 'sequence' or 'step', got {self.form!r}")
        if self.form == "step" and not self.causal:
            raise ValueError("form 'step' must have causal=True: without a mask a later token changes the outputs of earlier ones")


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs (i, i + d / 2) of x (…, d) by angles whose cosines and sines, (…, d / 2), are given."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SoftmaxAttention(nn.Module):
    """Attention over a sequence."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: SoftmaxAttentionConfig) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.bias)
        if config.rope_base:
            exponents = -torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
            cos, sin = rotary_table(config.rope_base**exponents, config.max_length)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def project(self, x: Tensor, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, L, d), keys and values (B, kv heads, L, d) of tokens (B, L, D) at the positions from `start` to `end`."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.rope_base:
            cos, sin = self.cos[start:end], self.sin[start:end]
            q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        """The block's output (B, L, D) for queries, keys and values as `project` gives them."""
        repeats = self.config.num_heads // self.config.num_kv_heads
        if repeats > 1:
            k, v = (x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Mixes tokens.

        Args:
            x: (B, L, hidden_size).

        Returns:
            y (B, L, hidden_size); with `causal` also the keys and values (B, num_kv_heads, L, head_dim) for the steps that follow.
        """
        q, k, v = self.project(x, 0, x.shape[1])
        y = self.attend(q, k, v, causal=self.config.causal)
        return (y, k, v) if self.config.causal else y


class SoftmaxAttentionStep(SoftmaxAttention):
    """Attention of one token to itself and a cache."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]  # the other form
        """One token of a stream.

        Args:
            x: The token (B, hidden_size).
            keys: The keys of the T tokens before it (B, num_kv_heads, T, head_dim), T at most max_length - 1.
            values: Their values, of the same shape.

        Returns:
            y (B, hidden_size), and the keys and values with those of this token after them, T + 1 of each.
        """
        position = keys.shape[2]
        q, k, v = self.project(x.unsqueeze(1), position, position + 1)
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        return self.attend(q, keys, values, causal=False).squeeze(1), keys, values


@register_model(
    "softmax-attention-tiny",
    SoftmaxAttentionConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, rope_base=10000.0, max_length=128),
    summary="Causal attention with 4 heads, 2 of keys, rotary positions, for trying",
)
@register_model(
    "softmax-attention-step-tiny",
    SoftmaxAttentionConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, rope_base=10000.0, max_length=128, form="step"),
    summary="One token of softmax-attention-tiny, with a contiguous cache of keys and values",
)
@register_model(
    "softmax-attention-full-tiny",
    SoftmaxAttentionConfig(hidden_size=32, num_heads=4, num_kv_heads=4, head_dim=8, causal=False, rope_base=0.0, max_length=128),
    summary="Attention of all tokens to all, without positions, for trying",
)
@register_model(
    "softmax-attention-transformer-base",
    SoftmaxAttentionConfig(hidden_size=512, num_heads=8, num_kv_heads=8, head_dim=64, causal=False, rope_base=0.0, max_length=4096),
    summary="The self-attention of the base Transformer's encoder, 8 heads of 64",
)
@register_model(
    "softmax-attention-llama3-8b", SoftmaxAttentionConfig(), summary="Llama 3 8B's attention: 32 heads of 128, 8 of keys, rotary positions"
)
@register_model(
    "softmax-attention-step-llama3-8b",
    SoftmaxAttentionConfig(form="step"),
    summary="One token of Llama 3 8B's attention, with a contiguous cache of keys and values",
)
def softmax_attention(config: SoftmaxAttentionConfig) -> ModelSpec:
    """A block of softmax attention, over a sequence or for one token."""
    step = config.form == "step"

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch, length = sizes["batch"], sizes["length"]
        cache = (batch, config.num_kv_heads, length, config.head_dim)
        shapes: dict[str, tuple[int, ...]] = {"x": (batch, length, config.hidden_size)}
        if step:
            shapes = {"x": (batch, config.hidden_size), "keys": cache, "values": cache}
        return {name: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}

    longest = config.max_length - 1 if step else config.max_length
    cached = {name: {0: "batch", 2: "length"} for name in ("keys", "values")}
    return ModelSpec(
        build=lambda: (SoftmaxAttentionStep if step else SoftmaxAttention)(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "length": 7},
        dynamic={"x": {0: "batch"}, **cached} if step else {"x": {0: "batch", 1: "length"}},
        ranges={"batch": SizeRange(1, 2, 16), "length": SizeRange(1, 7, longest)},
        outputs=("y", "all_keys", "all_values") if step else ("y", "keys", "values") if config.causal else ("y",),
        source="Vaswani et al., Attention Is All You Need, arXiv:1706.03762; Ainslie et al., GQA, arXiv:2305.13245; "
        "Su et al., RoFormer, arXiv:2104.09864; checked against transformers' LlamaAttention",
        analyses=()
        if step or config.causal or config.rope_base
        else (Analysis("coherence", settings={"transform": tokens_reversed, "back": tokens_reversed}),),
    )
