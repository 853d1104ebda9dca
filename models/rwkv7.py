"""RWKV-7 "Goose", a recurrent language model with a generalised delta rule (Peng et al., arXiv:2503.14456).

A layer is, with x the stream, LN layer norms and xx the token before less the token itself (token shift, zero before the first)::

    h = LN_1(x);  x_i = h + xx_h * mu_i for i in r, w, k, v, a, g
    r = W_r x_r   k = W_k x_k   v = W_v x_v   g = sigmoid(x_g G_1) G_2
    a = sigmoid(a_0 + x_a A_1 A_2)                        the in-context learning rate
    log decay = -exp(-1/2) sigmoid(w_0 + tanh(x_w W_1) W_2)
    v = v + (v_first - v) sigmoid(v_0 + x_v V_1 V_2)      from the second layer on; v_first is the first layer's v
    kappa = k * k_k, each head scaled to length 1         k = k (1 + (a - 1) k_a)
    y = the operator `rwkv7` of r, decay, k, v, -kappa, kappa a     S = S diag(decay) - (S kappa)(a kappa)^T + v k^T, y = S r
    x = x + W_o(g * (GroupNorm(y) + (sum over a head of r r_k k) v))
    h = LN_2(x);  x = x + W_value relu(W_key (h + xx_h mu_k))^2

Two forms share their weights: over a sequence, from a state to a state, and a step. The state of a layer are the tokens h that its two
token shifts have seen last, and S, here transposed (key, value), as the operator has it. Sequences start from zeros.

Parameters have the names and shapes of the authors' files (`blocks.N.att.*`); the first layer has no v0, v1 and v2, and those that some
files have there are dropped. The published `.pth` is read by a reader that takes nothing but tensors. Checked against the package `rwkv`
(BlinkDL, RWKV_x070), whose decay rounds exp(-1/2) to 0.606531; the group norm's epsilon of 64e-5 is its. The sizes are those of the
RWKV7-World3 models; the survey names the mechanisms without a formula.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.ops.rwkv7.eager import rwkv7, rwkv7_step
from ..exporter.ops.torch_library import split
from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model

_DECAY = math.exp(-0.5)


@dataclass(frozen=True)
class RWKV7Config:
    """Settings of an RWKV-7.

    Attributes:
        vocab_size: Number of tokens.
        hidden_size: D, width of the stream; a multiple of `head_size`.
        depth: Number of layers.
        head_size: Channels of a head.
        decay_rank: Inner width of the decay's low-rank product.
        rate_rank: That of the in-context learning rate.
        value_rank: That of the value residual.
        gate_rank: That of the gate.
        form: "sequence", or "step" for one token.
    """

    vocab_size: int = 65536
    hidden_size: int = 768
    depth: int = 12
    head_size: int = 64
    decay_rank: int = 64
    rate_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128
    form: str = "sequence"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "depth", "head_size", "decay_rank", "rate_rank", "value_rank", "gate_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.head_size:
            raise ValueError(f"hidden_size must be a multiple of head_size, got {self.hidden_size} and {self.head_size}")
        if self.form not in ("sequence", "step"):
            raise ValueError(f"form must be 'sequence' or 'step', got {self.form!r}")


def before(x: Tensor, last: Tensor) -> Tensor:
    """The token before each: x (B, L, D) after `last` (B, D); for one token (B, D) it is `last`."""
    return last if x.dim() == 2 else torch.cat([last.unsqueeze(1), x[:, :-1]], dim=1)


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[0]))


def _vector(width: int, low: float, high: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, width).uniform_(low, high))


class TimeMix(nn.Module):
    """Token shift, the seven projections, the recurrence, and the gate."""

    def __init__(self, config: RWKV7Config, *, first: bool) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.hidden_size // config.head_size
        self.config, self.heads, self.first = config, heads, first
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (_vector(width, 0, 1) for _ in range(6))
        self.w0, self.w1, self.w2 = _vector(width, -6, 1), _matrix(width, config.decay_rank), _matrix(config.decay_rank, width)
        self.a0, self.a1, self.a2 = _vector(width, -1, 1), _matrix(width, config.rate_rank), _matrix(config.rate_rank, width)
        if not first:
            self.v0, self.v1, self.v2 = _vector(width, 0, 1), _matrix(width, config.value_rank), _matrix(config.value_rank, width)
        self.g1, self.g2 = _matrix(width, config.gate_rank), _matrix(config.gate_rank, width)
        self.k_k, self.k_a = _vector(width, 0.7, 1), _vector(width, 0.9, 1.1)
        self.r_k = nn.Parameter(torch.randn(heads, config.head_size) * 0.1)
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ln_x = nn.GroupNorm(heads, width, eps=64e-5)

    def forward(self, x: Tensor, last: Tensor, state: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mixes tokens.

        Args:
            x: (B, L, D), or one token (B, D).
            last: The token before the first (B, D).
            state: (B, heads, key, value).
            v_first: The first layer's values, of the shape of x; None in the first layer.

        Returns:
            The output and the first layer's values, of the shape of x, and the state after the last token.
        """
        shift = before(x, last) - x
        lerp = {name: x + shift * getattr(self, f"x_{name}").flatten() for name in "rwkvag"}
        r, k, v = self.receptance(lerp["r"]), self.key(lerp["k"]), self.value(lerp["v"])
        decay = -_DECAY * torch.sigmoid(self.w0.flatten() + torch.tanh(lerp["w"] @ self.w1) @ self.w2)
        rate = torch.sigmoid(self.a0.flatten() + (lerp["a"] @ self.a1) @ self.a2)
        gate = torch.sigmoid(lerp["g"] @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0.flatten() + (lerp["v"] @ self.v1) @ self.v2)
        kappa = F.normalize(self._split(k * self.k_k.flatten()), dim=-1).flatten(-2)
        k = k * (1 + (rate - 1) * self.k_a.flatten())
        mix = rwkv7_step if x.dim() == 2 else rwkv7
        y, state = mix(r, decay, k, v, -kappa, kappa * rate, state, num_heads=self.heads)
        y = F.layer_norm(self._split(y), (self.config.head_size,), eps=self.ln_x.eps).flatten(-2) * self.ln_x.weight + self.ln_x.bias
        bonus = (self._split(r * k) * self.r_k).sum(-1, keepdim=True) * self._split(v)
        return self.output((y + bonus.flatten(-2)) * gate), v_first, state

    def _split(self, x: Tensor) -> Tensor:
        return split(x, self.heads)


class ChannelMix(nn.Module):
    """Token shift and a feed-forward layer with a squared ReLU."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = _vector(config.hidden_size, 0, 1)
        self.key = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.value = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        """Tokens x (B, L, D) after `last` (B, D), or one token (B, D), to the same shape."""
        out: Tensor = self.value(F.relu(self.key(x + (before(x, last) - x) * self.x_k.flatten())).square())
        return out


class Block(nn.Module):
    """Time mixing and channel mixing, each behind a layer norm and with a residual connection; the first normalises its input too."""

    def __init__(self, config: RWKV7Config, *, first: bool) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(config.hidden_size) if first else None
        self.ln1 = nn.LayerNorm(config.hidden_size)
        self.ln2 = nn.LayerNorm(config.hidden_size)
        self.att = TimeMix(config, first=first)
        self.ffn = ChannelMix(config)

    def forward(self, x: Tensor, shift: Tensor, state: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens x as of `TimeMix.forward` after the two tokens `shift` (B, 2, D), to x, the two last tokens, the state and v_first."""
        if self.ln0 is not None:
            x = self.ln0(x)
        h = self.ln1(x)
        y, v_first, state = self.att(h, shift[:, 0], state, v_first)
        x = x + y
        g = self.ln2(x)
        x = x + self.ffn(g, shift[:, 1])
        last = [h, g] if h.dim() == 2 else [h[:, -1], g[:, -1]]
        return x, torch.stack(last, dim=1), state, v_first


class RWKV7(nn.Module):
    """The network: tokens to the logits of the tokens that follow."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.depth))
        self.ln_out = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, shift: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts.

        Args:
            tokens: (B, L), int64; in the form "step" (B,).
            shift: (B, depth, 2, D), float32: the tokens that the shifts of time and channel mixing have seen last; zeros at the beginning.
            state: (B, depth, heads, key, value), float32; zeros at the beginning.

        Returns:
            Logits (B, L, vocab_size), in the form "step" (B, vocab_size), and shift and state after the last token.
        """
        x, v_first = self.emb(tokens), None
        shifts, states = [], []
        for block, last, carried in zip(self.blocks, shift.unbind(1), state.unbind(1), strict=True):
            x, last_shift, last_state, v_first = block(x, last, carried, v_first)
            shifts.append(last_shift)
            states.append(last_state)
        return self.head(self.ln_out(x)), torch.stack(shifts, dim=1), torch.stack(states, dim=1)


def _without_unused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name] for name in state if not re.fullmatch(r"blocks\.0\.att\.v[012]", name)}


@register_model(
    "rwkv7-tiny",
    RWKV7Config(vocab_size=48, hidden_size=32, depth=2, head_size=16, decay_rank=8, rate_rank=8, value_rank=4, gate_rank=8),
    summary="RWKV-7 with 2 layers of width 32, from a state to a state, for trying",
)
@register_model(
    "rwkv7-step-tiny",
    RWKV7Config(vocab_size=48, hidden_size=32, depth=2, head_size=16, decay_rank=8, rate_rank=8, value_rank=4, gate_rank=8, form="step"),
    summary="One token of rwkv7-tiny",
)
@register_model("rwkv7-0.1b", RWKV7Config(), summary="RWKV7-World3 0.1B, 191 M parameters")
@register_model("rwkv7-step-0.1b", RWKV7Config(form="step"), summary="One token of RWKV7-World3 0.1B")
@register_model("rwkv7-0.4b", RWKV7Config(hidden_size=1024, depth=24), summary="RWKV7-World3 0.4B, 451 M parameters")
@register_model("rwkv7-step-0.4b", RWKV7Config(hidden_size=1024, depth=24, form="step"), summary="One token of RWKV7-World3 0.4B")
@register_model(
    "rwkv7-1.5b",
    RWKV7Config(hidden_size=2048, depth=24, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=256),
    summary="RWKV7-World3 1.5B",
)
@register_model(
    "rwkv7-step-1.5b",
    RWKV7Config(hidden_size=2048, depth=24, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=256, form="step"),
    summary="One token of RWKV7-World3 1.5B",
)
@register_model(
    "rwkv7-2.9b",
    RWKV7Config(hidden_size=2560, depth=32, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=320),
    summary="RWKV7-World3 2.9B",
)
@register_model(
    "rwkv7-step-2.9b",
    RWKV7Config(hidden_size=2560, depth=32, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=320, form="step"),
    summary="One token of RWKV7-World3 2.9B",
)
def rwkv7_network(config: RWKV7Config) -> ModelSpec:
    """An RWKV-7 over a sequence, or one token of it."""
    step = config.form == "step"

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch, heads = sizes["batch"], config.hidden_size // config.head_size
        tokens = rng.integers(0, config.vocab_size, batch if step else (batch, sizes["length"]))
        shift = rng.standard_normal((batch, config.depth, 2, config.hidden_size), dtype=np.float32)
        state = rng.standard_normal((batch, config.depth, heads, config.head_size, config.head_size), dtype=np.float32)
        return {"tokens": torch.from_numpy(tokens), "shift": torch.from_numpy(shift), "state": torch.from_numpy(state)}

    return ModelSpec(
        build=lambda: RWKV7(config).eval(),
        inputs=inputs,
        sizes={"batch": 2} if step else {"batch": 2, "length": 12},
        dynamic={"tokens": {0: "batch"} if step else {0: "batch", 1: "length"}, "shift": {0: "batch"}, "state": {0: "batch"}},
        ranges={"batch": SizeRange(1, 2, 16)} | ({} if step else {"length": SizeRange(1, 12, 4096)}),
        outputs=("logits", "last_shift", "last_state"),
        source='Peng et al., RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv:2503.14456; checked against the package rwkv',
        layouts=(StateDictLayout("rwkv-lm", lambda keys: "blocks.0.att.v0" in keys, _without_unused, pth=True),),
    )
