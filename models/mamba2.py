"""Mamba-2: state space duality, a scan whose decay is one number a head (Dao and Gu, arXiv:2405.21060).

With x (L, D) a block's input, E = `expand` * D in H heads of P channels, N the state per channel and G groups of heads that share B and C,
the block is

    z, xBC, dt = in_proj(x)                              E, E + 2 G N and H channels
    x', B, C = silu(conv1d(xBC))                         depthwise, causal
    dt = softplus(dt + dt_bias)
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x'_t)^T        for each head, A = -exp(A_log), S (N, P)
    y_t = S_t^T C_t + D x'_t
    out = out_proj(RMSNorm(y silu(z)))                   the norm over each group's E / G channels

which is linear attention with a gated scalar decay: queries C, keys B, values dt x', scale 1. It is computed by our operator of that name,
in which the heads of a group have copies of their B and C. The backbone is that of `mamba`, and so are the two forms and their states; here
the convolution carries E + 2 G N channels, and the state of the scan is (B, depth, H, N, P), the transpose of the authors'.

Checked against the authors' code (state-spaces/mamba, modules/mamba2.py), whose parameter names are kept, and against transformers'
Mamba2ForCausalLM. Left out, because no published model uses it: a bound on dt other than (0, inf), an MLP beside the heads, and a norm
before the gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.ops.causal_conv1d.eager import causal_conv1d, causal_conv1d_step
from ..exporter.ops.linear_attention.eager import linear_attention, linear_attention_step
from ..exporter.ops.torch_library import split
from ..exporter.spec import ModelSpec, register_model
from .layers import RMSNorm
from .mamba import MambaLM, MambaLMStep, language_model, language_model_layouts


@dataclass(frozen=True)
class Mamba2Config:
    """Settings of a Mamba-2 language model.

    Attributes:
        vocab_size: Tokens that are told apart; the published models have 50277, padded to a multiple of 16.
        hidden_size: D, width of the residual stream.
        depth: Number of layers.
        expand: E / D, width inside a block over that of the stream.
        head_size: P, channels of a head; divides E.
        groups: G, groups of heads; divides their number.
        state_size: N, state of the scan per channel.
        conv_size: Width of the causal convolution, at least 2.
        norm_eps: Epsilon of the norms.
    """

    vocab_size: int = 50288
    hidden_size: int = 768
    depth: int = 24
    expand: int = 2
    head_size: int = 64
    groups: int = 1
    state_size: int = 128
    conv_size: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "depth", "expand", "head_size", "groups", "state_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.conv_size < 2:
            raise ValueError(f"conv_size must be at least 2, got {self.conv_size}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be above 0, got {self.norm_eps}")
        if self.inner % self.head_size:
            raise ValueError(f"head_size must divide expand * hidden_size = {self.inner}, got {self.head_size}")
        if self.heads % self.groups:
            raise ValueError(f"groups must divide the {self.heads} heads, got {self.groups}")

    @property
    def inner(self) -> int:
        """E, width inside a block."""
        return self.expand * self.hidden_size

    @property
    def heads(self) -> int:
        """H, number of heads."""
        return self.inner // self.head_size

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the states of all layers, without the batch."""
        return {
            "conv_states": (self.depth, self.inner + 2 * self.groups * self.state_size, self.conv_size - 1),
            "ssm_states": (self.depth, self.heads, self.state_size, self.head_size),
        }


class GatedRMSNorm(RMSNorm):
    """RMSNorm of x silu(gate) within each of `groups` equal parts of the channels."""

    def __init__(self, dim: int, eps: float, groups: int) -> None:
        super().__init__(dim, eps)
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]  # with a gate
        """X and gate (…, dim), to the same shape."""
        gated = x * F.silu(gate)
        if self.groups == 1:
            return super().forward(gated)
        parts = split(gated, self.groups)
        wide = parts.float() if parts.dtype in (torch.float16, torch.bfloat16) else parts
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normal.flatten(-2).to(x.dtype)


class Mamba2Block(nn.Module):
    """A Mamba-2 block (see the module's text), over a sequence or one token, with the states before and after.

    Its parameters have the names of the authors' `mixer`.
    """

    def __init__(
        self,
        width: int,
        *,
        state_size: int = 128,
        conv_size: int = 4,
        expand: int = 2,
        head_size: int = 64,
        groups: int = 1,
        norm_eps: float = 1e-5,
    ) -> None:
        """Draws the weights; for the settings see `Mamba2Config`."""
        super().__init__()
        inner = expand * width
        self.heads, self.groups = inner // head_size, groups
        mixed = inner + 2 * groups * state_size
        self.splits = (inner, mixed, self.heads)
        self.parts = (inner, groups * state_size, groups * state_size)
        self.in_proj = nn.Linear(width, sum(self.splits), bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, conv_size, groups=mixed, padding=conv_size - 1)
        # The authors' initialisation: decays spread over 1 to 16, step sizes log-uniformly over 1e-3 to 1e-1.
        self.A_log = nn.Parameter(torch.log(torch.rand(self.heads) * 15 + 1))
        delta = torch.exp(torch.rand(self.heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.dt_bias = nn.Parameter(delta + torch.log(-torch.expm1(-delta)))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(inner, norm_eps, groups)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, conv_state: Tensor | None = None, ssm_state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Computes a sequence.

        Args:
            x: (B, L, D).
            conv_state: The conv_size - 1 inputs of the convolution before it (B, E + 2 G N, conv_size - 1), or None for zeros.
            ssm_state: The state of the scan before it (B, H, N, P), or None for zeros.

        Returns:
            (B, L, D), and both states after the last token.
        """
        z, mixed, dt = torch.split(self.in_proj(x), list(self.splits), dim=-1)
        convolved, conv_state = causal_conv1d(mixed.transpose(1, 2), self.conv1d.weight, self.conv1d.bias, conv_state, silu=True)
        u, q, k, v, decay = self._heads(convolved.transpose(1, 2), dt)
        y, ssm_state = linear_attention(
            q, k, v, decay, None, ssm_state, q_num_heads=self.heads, kv_num_heads=self.heads, update_rule="gated", scale=1.0
        )
        return self._leave(y, u, z), conv_state, ssm_state

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes one token x (B, D); states and results as in `forward`, without the axis of tokens."""
        z, mixed, dt = torch.split(self.in_proj(x), list(self.splits), dim=-1)
        convolved, conv_state = causal_conv1d_step(mixed, self.conv1d.weight, conv_state, bias=self.conv1d.bias, silu=True)
        u, q, k, v, decay = self._heads(convolved, dt)
        y, ssm_state = linear_attention_step(q, k, v, ssm_state, decay=decay, q_num_heads=self.heads, kv_num_heads=self.heads, scale=1.0)
        return self._leave(y, u, z), conv_state, ssm_state

    def _heads(self, convolved: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x', queries, keys, values (…, E) or (…, H N), and the logarithm of the decay (…, H)."""
        u, B, C = torch.split(convolved, list(self.parts), dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        v = (split(u, self.heads) * dt.unsqueeze(-1)).flatten(-2)
        return u, self._spread(C), self._spread(B), v, -torch.exp(self.A_log) * dt

    def _spread(self, x: Tensor) -> Tensor:
        """(…, G N) to (…, H N): a copy for each head of its group."""
        if self.groups == self.heads:
            return x
        copies = [-1] * (x.ndim - 1) + [self.groups, self.heads // self.groups, -1]
        return split(x, self.groups).unsqueeze(-2).expand(copies).flatten(-3)

    def _leave(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        skip = (split(u, self.heads) * self.D.unsqueeze(-1)).flatten(-2)
        out: Tensor = self.out_proj(self.norm(y + skip, z))
        return out


_SOURCE = (
    "Dao & Gu, Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality, "
    "arXiv:2405.21060; checked against transformers"
)


def _model(config: Mamba2Config, *, step: bool) -> ModelSpec:
    def build() -> nn.Module:
        blocks = [
            Mamba2Block(
                config.hidden_size,
                state_size=config.state_size,
                conv_size=config.conv_size,
                expand=config.expand,
                head_size=config.head_size,
                groups=config.groups,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.depth)
        ]
        return (MambaLMStep if step else MambaLM)(config.vocab_size, config.hidden_size, blocks, config.norm_eps)

    layouts = language_model_layouts(
        {
            "model_type": "mamba2",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.depth,
            "state_size": config.state_size,
            "conv_kernel": config.conv_size,
            "expand": config.expand,
            "num_heads": config.heads,
            "head_dim": config.head_size,
            "n_groups": config.groups,
            "layer_norm_epsilon": config.norm_eps,
            "hidden_act": "silu",
            "use_bias": False,
            "use_conv_bias": True,
            "tie_word_embeddings": True,
        }
    )
    return language_model(build, vocab_size=config.vocab_size, states=config.states, step=step, source=_SOURCE, layouts=layouts)


@register_model(
    "mamba2-tiny",
    Mamba2Config(vocab_size=64, hidden_size=32, depth=2, head_size=16, groups=2, state_size=8),
    summary="Mamba-2 with 2 layers of width 32, prefill with states, for trying",
)
@register_model("mamba2-130m", Mamba2Config(), summary="Mamba-2 130M, prefill with states")
@register_model("mamba2-370m", Mamba2Config(hidden_size=1024, depth=48), summary="Mamba-2 370M, prefill with states")
@register_model("mamba2-780m", Mamba2Config(hidden_size=1536, depth=48), summary="Mamba-2 780M, prefill with states")
@register_model("mamba2-1.3b", Mamba2Config(hidden_size=2048, depth=48), summary="Mamba-2 1.3B, prefill with states")
@register_model("mamba2-2.7b", Mamba2Config(hidden_size=2560, depth=64), summary="Mamba-2 2.7B, prefill with states")
def mamba2(config: Mamba2Config) -> ModelSpec:
    """A Mamba-2 language model over a sequence."""
    return _model(config, step=False)


@register_model(
    "mamba2-step-tiny",
    Mamba2Config(vocab_size=64, hidden_size=32, depth=2, head_size=16, groups=2, state_size=8),
    summary="One token of mamba2-tiny, with states",
)
@register_model("mamba2-step-130m", Mamba2Config(), summary="One token of Mamba-2 130M, with states")
@register_model("mamba2-step-370m", Mamba2Config(hidden_size=1024, depth=48), summary="One token of Mamba-2 370M, with states")
@register_model("mamba2-step-780m", Mamba2Config(hidden_size=1536, depth=48), summary="One token of Mamba-2 780M, with states")
@register_model("mamba2-step-1.3b", Mamba2Config(hidden_size=2048, depth=48), summary="One token of Mamba-2 1.3B, with states")
@register_model("mamba2-step-2.7b", Mamba2Config(hidden_size=2560, depth=64), summary="One token of Mamba-2 2.7B, with states")
def mamba2_step(config: Mamba2Config) -> ModelSpec:
    """A Mamba-2 language model, one token at a time."""
    return _model(config, step=True)
