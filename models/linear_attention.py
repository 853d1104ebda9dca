"""A transformer with linear attention (Katharopoulos et al., Transformers are RNNs, arXiv:2006.16236).

For each head, with phi(x) = elu(x) + 1, which is positive, over the tokens m <= n where the attention is causal and over all otherwise::

    y_n = (phi(q_n) sum_m phi(k_m) v_m^T) / (phi(q_n) sum_m phi(k_m) + eps)

which without the mask is the survey's phi(Q) (phi(K)^T V) / phi(Q) (phi(K)^T 1). Keys are summed once, so that time is linear in the
number of tokens, and a causal model is a recurrence whose state are the two sums. Three forms share their weights: over a sequence, causal,
from a state to a state; the step of one token; and over a sequence, each token seeing all. The causal sums are the operator
`linear_attention` with the rule "linear" and the others are `normalized_linear_attention`, whose ReLU changes nothing of positive features.

- A further channel of v, constant 1, carries the denominator through the same sums, as the last column of the state.
- phi is computed as exp(min(x, 0)) + max(x, 0): elu(x) + 1 in floating point loses the digits of small features, and is 0 for x < -17,
  where a token with such keys would have no denominator.
- Numerator and denominator are both divided by the size of a head, so that half precision holds those of some 40,000 tokens.

The network around it is that of the authors' code (idiap/fast-transformers, `TransformerEncoderBuilder`): layer norm after each of the two
residual branches, ReLU, a last norm; parameters have its names. The epsilon is its 1e-6. Embeddings of pixels and positions, and the
mixture of logistics of the image models, are not part of it; tokens of the network's width go in and come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.ops.linear_attention.eager import linear_attention, linear_attention_step
from ..exporter.ops.normalized_linear_attention.eager import normalized_linear_attention
from ..exporter.spec import ModelSpec, SizeRange, register_model

FORMS = ("sequence", "step", "full")


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Settings of a transformer with linear attention.

    Attributes:
        depth: Number of layers.
        num_heads: Heads of each.
        head_dim: Channels of a head; num_heads * head_dim is the width of the network.
        ffn_size: Channels inside the feed-forward layer.
        eps: Added to the normaliser.
        form: "sequence" for causal attention from a state, "step" for one token of it, "full" for attention that is not causal.
    """

    depth: int = 8
    num_heads: int = 8
    head_dim: int = 32
    ffn_size: int = 1024
    eps: float = 1e-6
    form: str = "sequence"

    def __post_init__(self) -> None:
        for name in ("depth", "num_heads", "head_dim", "ffn_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must be at least 0 and less than 1, got {self.eps}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")


def features(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1, with all digits of small values; any shape."""
    return torch.exp(torch.clamp(x, max=0.0)) + F.relu(x)


class AttentionLayer(nn.Module):
    """Projections and linear attention in its three forms."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.config = config
        self.query_projection = nn.Linear(width, width)
        self.key_projection = nn.Linear(width, width)
        self.value_projection = nn.Linear(width, width)
        self.out_projection = nn.Linear(width, width)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mixes tokens x (B, L, D), or computes one, (B, D).

        `state` (B, heads, d, d + 1) has the sums over the tokens before, values first and the keys' own in the last column; None for
        attention that is not causal. Returns the outputs, of the shape of x, and the state after the last token.
        """
        heads, width = self.config.num_heads, self.config.head_dim
        q, k, v = features(self.query_projection(x)), features(self.key_projection(x)), self.value_projection(x)
        if state is None:
            y = normalized_linear_attention(q, k, v, num_heads=heads, eps=self.config.eps)
            return self.out_projection(y), None
        v = F.pad(v.unflatten(-1, (heads, width)), (0, 1), value=1.0).flatten(-2)
        scale = 1.0 / width
        if x.dim() == 2:
            y, state = linear_attention_step(q, k, v, state, q_num_heads=heads, kv_num_heads=heads, scale=scale)
        else:
            y, state = linear_attention(
                q, k, v, initial_state=state, q_num_heads=heads, kv_num_heads=heads, scale=scale, update_rule="linear"
            )
        sums = y.unflatten(-1, (heads, width + 1))
        y = sums[..., :-1] / (sums[..., -1:] + self.config.eps / width)
        return self.out_projection(y.flatten(-2)), state


class LinearAttentionLayer(nn.Module):
    """Linear attention and a feed-forward layer, each with a residual connection and a layer norm after it."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.attention = AttentionLayer(config)
        self.linear1 = nn.Linear(width, config.ffn_size)
        self.linear2 = nn.Linear(config.ffn_size, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Shapes as of `AttentionLayer.forward`."""
        y, state = self.attention(x, state)
        x = self.norm1(x + y)
        return self.norm2(x + self.linear2(F.relu(self.linear1(x)))), state


class LinearTransformer(nn.Module):
    """The network, in the form that the config names."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(LinearAttentionLayer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.num_heads * config.head_dim)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Computes the tokens.

        Args:
            x: (B, L, D) with D = num_heads * head_dim; in the form "step" one token (B, D).
            state: (B, depth, num_heads, head_dim, head_dim + 1), float32: the sums over the tokens before, zeros for none. Not in the
                form "full".

        Returns:
            y, of the shape of x; besides the form "full" also the state after the last token.
        """
        if state is None:
            for layer in self.layers:
                x, _ = layer(x, None)
            y: Tensor = self.norm(x)
            return y
        states = []
        for layer, before in zip(self.layers, state.unbind(1), strict=True):
            x, after = layer(x, before)
            states.append(after)
        return self.norm(x), torch.stack(states, dim=1)


@register_model(
    "linear-attention-tiny",
    LinearAttentionConfig(depth=2, num_heads=2, head_dim=16, ffn_size=64),
    summary="Causal linear transformer with 2 layers of width 32, from a state to a state, for trying",
)
@register_model(
    "linear-attention-step-tiny",
    LinearAttentionConfig(depth=2, num_heads=2, head_dim=16, ffn_size=64, form="step"),
    summary="One token of linear-attention-tiny",
)
@register_model(
    "linear-attention-full-tiny",
    LinearAttentionConfig(depth=2, num_heads=2, head_dim=16, ffn_size=64, form="full"),
    summary="linear-attention-tiny without the causal mask",
)
@register_model(
    "linear-attention-mnist", LinearAttentionConfig(), summary="The paper's causal model of MNIST images: 8 layers of 8 heads of 32"
)
@register_model("linear-attention-step-mnist", LinearAttentionConfig(form="step"), summary="One token of linear-attention-mnist")
@register_model(
    "linear-attention-cifar10", LinearAttentionConfig(depth=16), summary="The paper's causal model of CIFAR-10: 16 layers of 8 heads of 32"
)
@register_model(
    "linear-attention-step-cifar10", LinearAttentionConfig(depth=16, form="step"), summary="One token of linear-attention-cifar10"
)
def linear_attention_transformer(config: LinearAttentionConfig) -> ModelSpec:
    """A transformer with linear attention, in one of its forms."""
    width = config.num_heads * config.head_dim

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = sizes["batch"]
        shape = (batch, width) if config.form == "step" else (batch, sizes["length"], width)
        drawn = {"x": rng.standard_normal(shape, dtype=np.float32)}
        if config.form != "full":
            # The sums over five tokens: those of the keys' features, in the last column, are positive.
            heads = (5, batch, config.depth, config.num_heads)
            keys = np.exp(rng.standard_normal((*heads, config.head_dim, 1)) / 2)
            values = rng.standard_normal((*heads, 1, config.head_dim + 1))
            values[..., -1] = 1
            drawn["state"] = (keys * values).sum(0).astype(np.float32)
        return {name: torch.from_numpy(array) for name, array in drawn.items()}

    longest = 16384
    sequence = {} if config.form == "step" else {1: "length"}
    return ModelSpec(
        build=lambda: LinearTransformer(config).eval(),
        inputs=inputs,
        sizes={"batch": 2} if config.form == "step" else {"batch": 2, "length": 12},
        dynamic={"x": {0: "batch", **sequence}} | ({} if config.form == "full" else {"state": {0: "batch"}}),
        ranges={"batch": SizeRange(1, 2, 16)} | ({} if config.form == "step" else {"length": SizeRange(1, 12, longest)}),
        outputs=("y",) if config.form == "full" else ("y", "last_state"),
        source="Katharopoulos et al., Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, arXiv:2006.16236; "
        "network: idiap/fast-transformers; the attention checked against fla-core",
    )
