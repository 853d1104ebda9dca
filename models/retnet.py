"""RetNet: multi-scale retention in its parallel, chunkwise and recurrent forms (Sun et al., arXiv:2307.08621).

For each head with decay gamma, q and k turned by their positions n and m, and S_n of the size of one head's key times its value::

    parallel     Y = (Q K^T * D) V / sqrt(d)             D_nm = gamma^(n - m) for m <= n, 0 otherwise
    recurrent    S_n = gamma S_{n-1} + k_n v_n^T         y_n = q_n S_n / sqrt(d)

The chunkwise form is the parallel one inside chunks and the recurrent one between them: the operator `linear_attention` with the rule
"gated", from a state to a state. A layer is

    X + MSR(LN(X)), then X + FFN(LN(X))         FFN(X) = gelu(X W_1) W_2
    MSR(X) = (swish(X W_G) * GroupNorm(heads)) W_O          a group is a head, without gains

What the survey's sketch of one update shows is kept as the recurrence above. It has one gamma of 0.9; here each head h has its own,
1 - 2^(-5 - h), as in the paper ("multi-scale"). outer(key, value) is k_n v_n^T. The rotation (xPos, Sun et al., arXiv:2212.10554; the
decay takes the place of its scaling), the gate and the norms, which the sketch lacks, are the paper's.

**Positions.** The angles are n / 10000^(i / (d / 2 - 1)) for the channel pair (2 i, 2 i + 1), as in the authors' code (torchscale).
Scores depend on n - m alone, and so the state is kept as seen from its last token, whose angle is 0: each step turns it by one token back.
No position is counted, nothing grows with the length of a stream, and no angle is beyond what one call holds: n theta in float32 would be
off by 0.03 rad after a million tokens. A state that is kept at absolute angles, as in other implementations, becomes this one when turned
back by the angles of its last token.

The paper's three normalisations of the parallel form (by the rows of D, and of the scores) are left out but for 1 / sqrt(d): they scale a
head's output by a number a row, which the group norm takes away again. Values are twice as wide as keys (table of section 3.1). Inferred:
epsilons of 1e-6 and embeddings multiplied by sqrt(D), which also are the output weights, from the authors' code; the vocabulary, 50,257.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.ops.linear_attention.eager import linear_attention, linear_attention_step
from ..exporter.ops.torch_library import split
from ..exporter.spec import ModelSpec, SizeRange, register_model
from .layers import rotary_table

FORMS = ("parallel", "chunkwise", "recurrent")


@dataclass(frozen=True)
class RetNetConfig:
    """Settings of a RetNet.

    Attributes:
        vocab_size: Number of tokens.
        hidden_size: D, width of the residual stream; a multiple of 2 * `num_heads`.
        depth: Number of layers.
        num_heads: Heads of the retention.
        value_factor: Width of the values over that of the keys, D.
        ffn_size: Channels inside the feed-forward layer.
        max_length: The longest sequence of one call. A stream of calls has no limit.
        form: "parallel" for a sequence from its beginning, "chunkwise" for one that continues from a state, "recurrent" for one token.
    """

    vocab_size: int = 50257
    hidden_size: int = 2048
    depth: int = 24
    num_heads: int = 8
    value_factor: int = 2
    ffn_size: int = 4096
    max_length: int = 4096
    form: str = "parallel"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "depth", "num_heads", "value_factor", "ffn_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length < 16:
            raise ValueError(f"max_length must be at least 16, got {self.max_length}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * num_heads, got hidden_size={self.hidden_size}, num_heads={self.num_heads}"
            )
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")


def turn(x: Tensor, cos: Tensor, sin: Tensor, axis: int) -> Tensor:
    """Turns the neighbouring pairs of x along `axis` (negative, counted from the end) by angles whose cosines and sines are given.

    cos and sin broadcast with x when `axis` is half as long there.
    """
    real, imaginary = torch.unflatten(x, axis, (-1, 2)).unbind(axis)
    return torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=axis).flatten(axis - 1, axis)


class MultiScaleRetention(nn.Module):
    """Gated multi-scale retention in its three forms."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.value_factor * config.hidden_size
        self.config = config
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, wide, bias=False)
        self.g_proj = nn.Linear(width, wide, bias=False)
        self.out_proj = nn.Linear(wide, width, bias=False)

    def forward(self, x: Tensor, state: Tensor | None, tables: tuple[Tensor, Tensor], decay: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes tokens.

        Args:
            x: (B, L, D), or one token (B, D) in the recurrent form.
            state: (B, heads, key, value) as seen from the token before the first; None in the parallel form.
            tables: Cosines and sines (positions, key / 2).
            decay: (heads,), logarithms of the gammas.

        Returns:
            The output, of the shape of x, and the state as seen from the last token.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if state is None:
            y, state = self.parallel(q, k, v, tables, decay)
        elif x.dim() == 2:
            y, state = self.recurrent(q, k, v, state, tables, decay)
        else:
            y, state = self.chunkwise(q, k, v, state, tables, decay)
        heads = split(y, self.config.num_heads)
        normed = F.layer_norm(heads, (heads.shape[-1],), eps=1e-6).flatten(-2)
        return self.out_proj(F.silu(self.g_proj(x)) * normed), state

    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, tables: tuple[Tensor, Tensor], decay: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token: q and k (B, D), v (B, values). Decay and turn are one factor, gamma exp(-i theta)."""
        cos, sin = (torch.exp(decay)[:, None, None] * table[1].unsqueeze(-1) for table in tables)  # (heads, key / 2, 1)
        heads = self.config.num_heads
        return linear_attention_step(q, k, v, turn(state, cos, -sin, -2), q_num_heads=heads, kv_num_heads=heads)

    def chunkwise(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, tables: tuple[Tensor, Tensor], decay: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A sequence that continues: q and k (B, L, D), v (B, L, values). Its first token is one token from where the state is seen."""
        batch, length, _ = q.shape
        heads = self.config.num_heads
        cos, sin = (table[1 : length + 1].unsqueeze(1) for table in tables)
        q, k = (turn(split(z, heads), cos, sin, -1).flatten(-2) for z in (q, k))
        y, state = linear_attention(
            q,
            k,
            v,
            decay=decay.expand(batch, length, -1).contiguous(),
            initial_state=state,
            q_num_heads=heads,
            kv_num_heads=heads,
            update_rule="gated",
        )
        last_cos, last_sin = (table[length : length + 1].transpose(0, 1) for table in tables)
        return y, turn(state, last_cos, -last_sin, -2)

    def parallel(self, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], decay: Tensor) -> tuple[Tensor, Tensor]:
        """A sequence from its beginning: q and k (B, L, D), v (B, L, values)."""
        length = q.shape[1]
        q, k, v = (split(z, self.config.num_heads).transpose(1, 2) for z in (q, k, v))
        cos, sin = (table[:length] for table in tables)
        q, k = turn(q, cos, sin, -1), turn(k, cos, sin, -1)
        places = torch.arange(length, device=q.device)
        distance = places[:, None] - places[None, :]
        powers = torch.exp(decay[:, None, None] * distance.clamp(min=0)) * (distance >= 0)  # D, (heads, L, L)
        scores = (q @ k.transpose(-1, -2)) * (k.shape[-1] ** -0.5)
        y = (scores * powers) @ v
        # The last row of D is what each token has decayed to at the end.
        state = (k * powers[:, -1].unsqueeze(-1)).transpose(-1, -2) @ v
        last_cos, last_sin = (table[length - 1 : length].transpose(0, 1) for table in tables)
        return y.transpose(1, 2).flatten(2), turn(state, last_cos, -last_sin, -2)


class FeedForward(nn.Module):
    """GELU between two projections, of the last axis."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class RetNetLayer(nn.Module):
    """Retention and feed-forward layer, each behind a layer norm and with a residual connection."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.retention_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.retention = MultiScaleRetention(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, state: Tensor | None, tables: tuple[Tensor, Tensor], decay: Tensor) -> tuple[Tensor, Tensor]:
        """As `MultiScaleRetention.forward`."""
        y, state = self.retention(self.retention_layer_norm(x), state, tables, decay)
        x = x + y
        return x + self.ffn(self.final_layer_norm(x)), state


class RetNet(nn.Module):
    """The network: tokens to the logits of the tokens that follow. Parameters have the names of torchscale's decoder."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(RetNetLayer(config) for _ in range(config.depth))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        pairs = config.hidden_size // config.num_heads // 2
        steps = torch.arange(pairs, dtype=torch.float64, device="cpu") / max(pairs - 1, 1)
        cos, sin = rotary_table(10000.0**-steps, config.max_length + 1)
        gammas = 1 - 2.0 ** (-5 - torch.arange(config.num_heads, dtype=torch.float64, device="cpu"))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("decay", gammas.log().float(), persistent=False)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predicts.

        Args:
            tokens: (B, L), int64, L at most max_length; in the recurrent form (B,).
            state: (B, depth, num_heads, key, value), float32, what a call has returned; zeros at the beginning. The parallel form has none.

        Returns:
            Logits (B, L, vocab_size), in the recurrent form (B, vocab_size), and the state after the last token.
        """
        x = self.embed_tokens(tokens) * math.sqrt(self.config.hidden_size)
        before = [None] * self.config.depth if state is None else state.unbind(1)
        states = []
        for layer, mine in zip(self.layers, before, strict=True):
            x, after = layer(x, mine, (self.cos, self.sin), self.decay)
            states.append(after)
        return F.linear(self.layer_norm(x), self.embed_tokens.weight), torch.stack(states, dim=1)


@register_model(
    "retnet-tiny",
    RetNetConfig(vocab_size=48, hidden_size=32, depth=2, num_heads=2, ffn_size=64, max_length=1024),
    summary="RetNet with 2 layers of width 32, parallel form, for trying",
)
@register_model(
    "retnet-chunkwise-tiny",
    RetNetConfig(vocab_size=48, hidden_size=32, depth=2, num_heads=2, ffn_size=64, max_length=1024, form="chunkwise"),
    summary="retnet-tiny in the chunkwise form, from a state to a state",
)
@register_model(
    "retnet-recurrent-tiny",
    RetNetConfig(vocab_size=48, hidden_size=32, depth=2, num_heads=2, ffn_size=64, max_length=1024, form="recurrent"),
    summary="retnet-tiny in the recurrent form, one token from a state to a state",
)
@register_model("retnet-1.3b", RetNetConfig(), summary="RetNet 1.3B, parallel form: 24 layers of width 2048")
@register_model("retnet-chunkwise-1.3b", RetNetConfig(form="chunkwise"), summary="RetNet 1.3B in the chunkwise form")
@register_model("retnet-recurrent-1.3b", RetNetConfig(form="recurrent"), summary="RetNet 1.3B in the recurrent form")
def retnet(config: RetNetConfig) -> ModelSpec:
    """A RetNet in one of its forms."""
    step, key = config.form == "recurrent", config.hidden_size // config.num_heads

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = sizes["batch"]
        tokens = rng.integers(0, config.vocab_size, batch if step else (batch, sizes["length"]))
        drawn = {"tokens": torch.from_numpy(tokens)}
        if config.form != "parallel":
            shape = (batch, config.depth, config.num_heads, key, config.value_factor * key)
            drawn["state"] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        return drawn

    axes: dict[str, dict[int, str]] = {"tokens": {0: "batch"} if step else {0: "batch", 1: "length"}}
    ranges = {"batch": SizeRange(1, 2, 16)}
    return ModelSpec(
        build=lambda: RetNet(config).eval(),
        inputs=inputs,
        sizes={"batch": 2} if step else {"batch": 2, "length": 12},
        dynamic=axes if config.form == "parallel" else {**axes, "state": {0: "batch"}},
        ranges=ranges if step else {**ranges, "length": SizeRange(1, 12, config.max_length)},
        outputs=("logits", "last_state"),
        source="Sun et al., Retentive Network: A Successor to Transformer for Large Language Models, arXiv:2307.08621; "
        "checked against yet-another-retnet and fla-core",
    )
