"""One step of attention over a paged cache of keys and values (PagedAttention, Kwon et al., arXiv:2309.06180).

The cache of all sequences is one pool of pages of `page_size` tokens. A sequence of T tokens owns ceil(T / page_size) pages anywhere in the
pool; row b of the block table names them in order, so that token j of sequence b lies in page `table[b, j // page_size]` at
`j % page_size`. With the query q, key k' and value v' of the new token at position T, a step is, for each head,

    p = softmax([q k_0, …, q k_{T-1}, q k'] / sqrt(d));   y = W_o sum_j p_j v_j

as in `models/softmax_attention.py`, whose projections, rotary positions and grouped heads these are. The step writes nothing: it returns
the new key and value and the slot that they belong to, `page * page_size + offset`, and the host puts them there. So the pool is an input
that an engine reads in place, and is not copied through the graph.

The survey's sketch attends within each page of 2048 tokens and merges the pages' results, without saying how: attention that never crosses
a page is another function. Here the softmax runs over all pages of a sequence, which is what the paper computes, and what a merge with
the pages' maxima and sums gives. What is read of pages beyond a sequence's length has to be finite, and has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, register_model
from .layers import rotary_table
from .softmax_attention import rotate_halves


@dataclass(frozen=True)
class PagedAttentionConfig:
    """Settings of a block of paged attention.

    Attributes:
        hidden_size: Channels of a token.
        num_heads: Heads of queries.
        num_kv_heads: Heads of keys and values; divides `num_heads`.
        head_dim: Channels of a head, even.
        page_size: Tokens in a page.
        max_blocks: Pages of the longest sequence.
        rope_base: Base of the rotary frequencies.
    """

    hidden_size: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 2048
    max_blocks: int = 4
    rope_base: float = 500000.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_blocks < 2:
            raise ValueError(f"max_blocks must be at least 2, got {self.max_blocks}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}")
        if self.head_dim % 2 or self.rope_base <= 0:
            raise ValueError(f"rotary positions need an even head_dim and a positive rope_base, got {self.head_dim} and {self.rope_base}")


class PagedAttention(nn.Module):
    """The step. Parameters have the names of `softmax-attention`'s."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: PagedAttentionConfig) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        exponents = -torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
        cos, sin = rotary_table(config.rope_base**exponents, config.page_size * config.max_blocks)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, x: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One token of each sequence.

        Args:
            x: The tokens (B, hidden_size).
            key_pages: The pool of keys, with their positions applied, (P, page_size, num_kv_heads, head_dim).
            value_pages: The pool of values, of the same shape.
            block_table: (B, M) int64 in [0, P), the pages of each sequence in order; entries past its last page may name any page.
            lengths: (B,) int64 in [0, M page_size), the tokens before this one.

        Returns:
            y (B, hidden_size); the token's key and value (B, num_kv_heads, head_dim); and the slot (B,) int64 of the pool, in tokens, into
            which the host puts them before the next step.
        """
        config = self.config
        batch, repeats = x.shape[0], config.num_heads // config.num_kv_heads
        cos, sin = self.cos[lengths].unsqueeze(1), self.sin[lengths].unsqueeze(1)  # (B, 1, d / 2)
        query = rotate_halves(self.q_proj(x).unflatten(-1, (-1, config.head_dim)), cos, sin)  # (B, heads, d)
        key = rotate_halves(self.k_proj(x).unflatten(-1, (-1, config.head_dim)), cos, sin)
        value = self.v_proj(x).unflatten(-1, (-1, config.head_dim))

        keys = torch.cat([key_pages[block_table].flatten(1, 2), key.unsqueeze(1)], dim=1)  # (B, M page_size + 1, kv heads, d)
        values = torch.cat([value_pages[block_table].flatten(1, 2), value.unsqueeze(1)], dim=1)
        places = torch.arange(keys.shape[1] - 1, device=x.device)
        read = torch.cat([places < lengths.unsqueeze(1), torch.ones_like(lengths, dtype=torch.bool).unsqueeze(1)], dim=1)
        # The heads of queries that share one of keys are the rows of one product, so that nothing is repeated.
        y = F.scaled_dot_product_attention(
            query.reshape(batch, config.num_kv_heads, repeats, config.head_dim),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=read[:, None, None],
        )
        page = torch.gather(block_table, 1, (lengths // config.page_size).unsqueeze(1)).squeeze(1)
        return self.o_proj(y.reshape(batch, -1)), key, value, page * config.page_size + lengths % config.page_size


@register_model(
    "paged-attention-tiny",
    PagedAttentionConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, page_size=4, max_blocks=8, rope_base=10000.0),
    summary="A step of attention over pages of 4 tokens, 4 heads, for trying",
)
@register_model(
    "paged-attention-llama3-8b",
    PagedAttentionConfig(),
    summary="A step of Llama 3 8B's attention over pages of 2048 tokens",
)
def paged_attention(config: PagedAttentionConfig) -> ModelSpec:
    """A step of attention over a paged cache."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch, pages, blocks = sizes["batch"], sizes["pages"], sizes["blocks"]
        pool = (pages, config.page_size, config.num_kv_heads, config.head_dim)
        # Sequences may share pages, as those with a common prefix do.
        table = rng.integers(0, pages, (batch, blocks))
        lengths = rng.integers(0, blocks * config.page_size, batch)
        floats = {"x": (batch, config.hidden_size), "key_pages": pool, "value_pages": pool}
        return {name: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for name, shape in floats.items()} | {
            "block_table": torch.from_numpy(table),
            "lengths": torch.from_numpy(lengths),
        }

    return ModelSpec(
        build=lambda: PagedAttention(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "pages": 3, "blocks": 2},
        dynamic={
            "x": {0: "batch"},
            "key_pages": {0: "pages"},
            "value_pages": {0: "pages"},
            "block_table": {0: "batch", 1: "blocks"},
            "lengths": {0: "batch"},
        },
        ranges={"batch": SizeRange(1, 2, 64), "pages": SizeRange(1, 3, 4096), "blocks": SizeRange(1, 2, config.max_blocks)},
        outputs=("y", "key", "value", "slot"),
        source="Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, arXiv:2309.06180",
    )
