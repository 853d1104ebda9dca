"""Mamba: language models from selective state spaces (Gu and Dao, arXiv:2312.00752), and the Mamba-1 block that other architectures share.

With x (L, D) a block's input, E = `expand` * D, and N the state per channel, the block is

    x', z = in_proj(x)                                   (L, E) each
    u = silu(conv1d(x'))                                 depthwise, causal
    dt, B, C = x_proj(u)                                 ranks R, N, N
    delta = softplus(dt_proj(dt))
    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t       A = -exp(A_log), (E, N)
    y_t = (C_t h_t + D u_t) silu(z_t)
    out = out_proj(y)

and the backbone is an embedding, residual layers x + mixer(norm(x)) with RMSNorm, a last RMSNorm, and the embedding again as the head.

Checked against the authors' code (state-spaces/mamba, modules/mamba_simple.py and models/mixer_seq_simple.py), whose parameter names are
kept, and against transformers' MambaForCausalLM. The head is the transposed embedding, so that `lm_head.weight` of the published files is
compared with the embedding and dropped.

Two forms share the weights. The prefill takes a prompt of any length and the states before it, zeros at first, and returns the states after
it: a long prompt may come in pieces. The step takes one token. States of all layers are stacked on axis 1, so that a stream has two tensors
to hand on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.ops.causal_conv1d.eager import causal_conv1d, causal_conv1d_step
from ..exporter.ops.selective_scan.eager import selective_scan, selective_scan_step
from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model
from ..exporter.weights import same_in_all
from .layers import RMSNorm


@dataclass(frozen=True)
class MambaConfig:
    """Settings of a Mamba language model.

    Attributes:
        vocab_size: Tokens that are told apart; the published models have 50277, padded to a multiple of 8.
        hidden_size: D, width of the residual stream.
        depth: Number of layers.
        expand: E / D, width inside a block over that of the stream.
        state_size: N, state of the scan per channel.
        conv_size: Width of the causal convolution, at least 2.
        dt_rank: R, rank of the step size; 0 stands for ceil(D / 16), as in the published models.
        norm_eps: Epsilon of the norms.
    """

    vocab_size: int = 50280
    hidden_size: int = 768
    depth: int = 24
    expand: int = 2
    state_size: int = 16
    conv_size: int = 4
    dt_rank: int = 0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "depth", "expand", "state_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.conv_size < 2:
            raise ValueError(f"conv_size must be at least 2, got {self.conv_size}")
        if self.dt_rank < 0:
            raise ValueError(f"dt_rank must be at least 0, got {self.dt_rank}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be above 0, got {self.norm_eps}")

    @property
    def inner(self) -> int:
        """E, width inside a block."""
        return self.expand * self.hidden_size

    @property
    def rank(self) -> int:
        """R, rank of the step size."""
        return self.dt_rank or math.ceil(self.hidden_size / 16)


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor, *, initial_state: Tensor | None) -> Tensor:
    """`isthmus::causal_conv1d` with SiLU, (B, d, L) to (B, d, L)."""
    y: Tensor = causal_conv1d(x, weight, bias, initial_state, silu=True)[0]
    return y


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, *, reverse: bool) -> Tensor:
    """`isthmus::selective_scan` from a state of zeros, with softplus, (B, L, d) to (B, L, d)."""
    y: Tensor = selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus=True, reverse=reverse)[0]
    return y


class MambaCore(nn.Module):
    """The core of a Mamba-1 block, (B, L, d) to (B, L, d); its weights have the names of the authors' code.

    Attributes:
        convolve: What computes the convolution; our operators have no gradient, so that training puts others here and in `scan`.
        scan: What computes the selective scan.
    """

    def __init__(self, channels: int, state_size: int, conv_size: int, dt_rank: int, *, reverse: bool = False) -> None:
        super().__init__()
        self.reverse = reverse
        self.convolve: Callable[..., Tensor] = causal_convolution
        self.scan: Callable[..., Tensor] = scan
        self.splits = (dt_rank, state_size, state_size)
        self.conv1d = nn.Conv1d(channels, channels, conv_size, groups=channels, padding=conv_size - 1)
        self.x_proj = nn.Linear(channels, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(dt_rank, channels)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state_size + 1, dtype=torch.float32)).repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        # Mamba's initialisation: step sizes spread log-uniformly over 1e-3 to 1e-1, through the inverse of softplus.
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        delta = torch.exp(torch.rand(channels) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        with torch.no_grad():
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def forward(self, x: Tensor) -> Tensor:
        """Mixes (B, L, d) along L, each token seeing itself and those before it; with `reverse`, itself and those after it."""
        weight, bias = self.conv1d.weight, self.conv1d.bias
        inputs, initial_state = x.transpose(1, 2), None
        if self.reverse:
            # From the last token to the first, without turning anything round but the taps: shifted by the width, with zeros after the end.
            carried = weight.shape[2] - 1
            padded = F.pad(inputs, (0, carried))
            weight, initial_state, inputs = weight.flip(2), padded[:, :, :carried], padded[:, :, carried:]
        u = self.convolve(inputs, weight, bias, initial_state=initial_state).transpose(1, 2)
        delta, B, C = self.select(u)
        return self.scan(u, delta, -torch.exp(self.A_log), B, C, self.D, self.dt_proj.bias, reverse=self.reverse)

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step sizes (…, d) before bias and softplus, B (…, N) and C (…, N) for u (…, d).

        The bias of `dt_proj` and softplus are the scan's: the step is then never rounded to the dtype of the activations.
        """
        dt, B, C = torch.split(self.x_proj(u), list(self.splits), dim=-1)
        return F.linear(dt, self.dt_proj.weight), B, C


class Mamba1Block(MambaCore):
    """A whole Mamba-1 block (see the module's text), over a sequence or one token, with the states before and after.

    Its parameters have the names of the authors' `mixer`. Variants (Jamba's norms on dt, B and C) override `select`.
    """

    def __init__(
        self, width: int, *, state_size: int = 16, conv_size: int = 4, expand: int = 2, dt_rank: int = 0, bias: bool = False
    ) -> None:
        """Draws the weights.

        Args:
            width: D.
            state_size: N.
            conv_size: Width of the convolution.
            expand: E / D.
            dt_rank: R; 0 stands for ceil(D / 16).
            bias: Whether the outer projections have biases.
        """
        inner = expand * width
        super().__init__(inner, state_size, conv_size, dt_rank or math.ceil(width / 16))
        self.in_proj = nn.Linear(width, 2 * inner, bias=bias)
        self.out_proj = nn.Linear(inner, width, bias=bias)

    def forward(  # type: ignore[override]  # with a state
        self, x: Tensor, conv_state: Tensor | None = None, ssm_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes a sequence.

        Args:
            x: (B, L, D).
            conv_state: The conv_size - 1 inputs of the convolution before it (B, E, conv_size - 1), or None for zeros.
            ssm_state: The state of the scan before it (B, E, N), or None for zeros.

        Returns:
            (B, L, D), and both states after the last token.
        """
        stream, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv_state = causal_conv1d(stream.transpose(1, 2), self.conv1d.weight, self.conv1d.bias, conv_state, silu=True)
        u = u.transpose(1, 2)
        delta, B, C = self.select(u)
        A = -torch.exp(self.A_log)
        y, ssm_state = selective_scan(u, delta, A, B, C, self.D, z, self.dt_proj.bias, ssm_state, delta_softplus=True)
        return self.out_proj(y), conv_state, ssm_state

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes one token x (B, D); states and results as in `forward`, without the axis of tokens."""
        stream, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv_state = causal_conv1d_step(stream, self.conv1d.weight, conv_state, bias=self.conv1d.bias, silu=True)
        delta, B, C = self.select(u)
        A = -torch.exp(self.A_log)
        y, ssm_state = selective_scan_step(u, delta, A, B, C, ssm_state, D=self.D, z=z, delta_bias=self.dt_proj.bias, delta_softplus=True)
        return self.out_proj(y), conv_state, ssm_state


class MambaLayer(nn.Module):
    """A block behind a norm, on the residual stream."""

    def __init__(self, width: int, mixer: nn.Module, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, norm_eps)
        self.mixer = mixer

    def forward(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stream (B, L, D) and the states, to the same."""
        y, conv_state, ssm_state = self.mixer(self.norm(x), conv_state, ssm_state)
        return x + y, conv_state, ssm_state

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token (B, D) and the states, to the same."""
        y, conv_state, ssm_state = cast("Mamba1Block", self.mixer).step(self.norm(x), conv_state, ssm_state)
        return x + y, conv_state, ssm_state


class MambaBackbone(nn.Module):
    """Embedding, layers and last norm: tokens to normed vectors."""

    def __init__(self, vocab_size: int, width: int, mixers: Sequence[nn.Module], norm_eps: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(MambaLayer(width, mixer, norm_eps) for mixer in mixers)
        self.norm_f = RMSNorm(width, norm_eps)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, conv_states: Tensor, ssm_states: Tensor, *, step: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Computes a sequence (B, L), or with `step` one token (B,); states and results as in `MambaLM`, normed vectors for logits."""
        h = self.embedding(tokens)
        conv_after, ssm_after = [], []
        layers = cast("list[MambaLayer]", self.layers)
        for layer, conv_state, ssm_state in zip(layers, conv_states.unbind(1), ssm_states.unbind(1), strict=True):
            h, conv, ssm = (layer.step if step else layer)(h, conv_state, ssm_state)
            conv_after.append(conv)
            ssm_after.append(ssm)
        return self.norm_f(h), torch.stack(conv_after, dim=1), torch.stack(ssm_after, dim=1)


class MambaLM(nn.Module):
    """A language model of residual Mamba blocks, of one kind or another, over a sequence."""

    def __init__(self, vocab_size: int, width: int, mixers: Sequence[nn.Module], norm_eps: float) -> None:
        """Draws the embedding.

        Args:
            vocab_size: Tokens that are told apart.
            width: D.
            mixers: The blocks: (B, L, D) and two states to the same, a method `step` that does so for (B, D), and an `out_proj`.
            norm_eps: Epsilon of the norms.
        """
        super().__init__()
        self.backbone = MambaBackbone(vocab_size, width, mixers, norm_eps)
        scale_residual_branches(mixers)

    def forward(self, tokens: Tensor, conv_states: Tensor, ssm_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts the token after each.

        Args:
            tokens: (B, L), int64, in [0, vocab_size).
            conv_states: The last conv_size - 1 inputs of each layer's convolution (B, depth, channels, conv_size - 1), float32; zeros at
                first.
            ssm_states: The state of each layer's scan, (B, depth, E, N) with Mamba-1's blocks, float32; zeros at first.

        Returns:
            Logits (B, L, vocab_size), and the states after the last token.
        """
        h, conv_states, ssm_states = self.backbone(tokens, conv_states, ssm_states)
        return F.linear(h, self.backbone.embedding.weight), conv_states, ssm_states


class MambaLMStep(MambaLM):
    """The language model, one token at a time, with the same weights."""

    def forward(self, token: Tensor, conv_states: Tensor, ssm_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts the token after `token` (B,), int64: logits (B, vocab_size), and the states, whose shapes are those of the prefill."""
        h, conv_states, ssm_states = self.backbone(token, conv_states, ssm_states, step=True)
        return F.linear(h, self.backbone.embedding.weight), conv_states, ssm_states


def scale_residual_branches(mixers: Sequence[nn.Module]) -> None:
    """Divides the last projections of all blocks by the root of their number, as the authors do: depth does not swell the stream."""
    with torch.no_grad():
        for mixer in mixers:
            mixer.get_parameter("out_proj.weight").div_(math.sqrt(len(mixers)))


def _tied(state: Mapping[str, Tensor], embedding: str) -> dict[str, Tensor]:
    """Our names for a file whose embedding is called `embedding` and may be stored a second time as the head."""
    converted = {key: value for key, value in state.items() if key not in (embedding, "lm_head.weight")}
    same_in_all(state, [name for name in (embedding, "lm_head.weight") if name in state], converted, "backbone.embedding.weight")
    return converted


def language_model_layouts(config: Mapping[str, object]) -> tuple[StateDictLayout, ...]:
    """The authors' layout, which stores the tied head besides the embedding, and that of transformers, which calls the embedding otherwise.

    Args:
        config: What transformers' `config.json` must say.
    """
    return (
        StateDictLayout(
            "state-spaces/mamba",
            lambda keys: {"backbone.embedding.weight", "lm_head.weight"} <= keys,
            lambda state: _tied(state, "backbone.embedding.weight"),
        ),
        StateDictLayout(
            "transformers",
            lambda keys: "backbone.embeddings.weight" in keys,
            lambda state: _tied(state, "backbone.embeddings.weight"),
            config=config,
        ),
    )


def _layouts(config: MambaConfig) -> tuple[StateDictLayout, ...]:
    return language_model_layouts(
        {
            "model_type": "mamba",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.depth,
            "state_size": config.state_size,
            "conv_kernel": config.conv_size,
            "expand": config.expand,
            "time_step_rank": config.rank,
            "layer_norm_epsilon": config.norm_eps,
            "hidden_act": "silu",
            "use_bias": False,
            "use_conv_bias": True,
        }
    )


_SOURCE = "Gu & Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv:2312.00752; checked against transformers"


def language_model(
    build: Callable[[], nn.Module],
    *,
    vocab_size: int,
    states: Mapping[str, tuple[int, ...]],
    step: bool,
    source: str,
    layouts: tuple[StateDictLayout, ...],
) -> ModelSpec:
    """The spec of a language model with states, over a sequence or one token at a time.

    Args:
        build: Makes the module, a `MambaLM` or with `step` a `MambaLMStep`.
        vocab_size: Tokens are drawn below it.
        states: Name and shape of each state, without the batch.
        step: Whether it takes one token.
        source: See `ModelSpec`.
        layouts: See `ModelSpec`.
    """
    tokens = "token" if step else "tokens"

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        shape = (sizes["batch"],) if step else (sizes["batch"], sizes["length"])
        drawn = {tokens: torch.from_numpy(rng.integers(0, vocab_size, shape))}
        for name, rest in states.items():
            drawn[name] = torch.from_numpy(rng.standard_normal((sizes["batch"], *rest), dtype=np.float32))
        return drawn

    length = {} if step else {"length": 16}
    return ModelSpec(
        build=lambda: build().eval(),
        inputs=inputs,
        sizes={"batch": 2, **length},
        dynamic={tokens: {0: "batch"} if step else {0: "batch", 1: "length"}, **{name: {0: "batch"} for name in states}},
        ranges={"batch": SizeRange(1, 2, 16), **({} if step else {"length": SizeRange(1, 64, 2048)})},
        outputs=("logits", *(f"last_{name}" for name in states)),
        source=source,
        layouts=layouts,
    )


def _model(config: MambaConfig, *, step: bool) -> ModelSpec:
    def build() -> nn.Module:
        blocks = [
            Mamba1Block(
                config.hidden_size, state_size=config.state_size, conv_size=config.conv_size, expand=config.expand, dt_rank=config.rank
            )
            for _ in range(config.depth)
        ]
        return (MambaLMStep if step else MambaLM)(config.vocab_size, config.hidden_size, blocks, config.norm_eps)

    states = {
        "conv_states": (config.depth, config.inner, config.conv_size - 1),
        "ssm_states": (config.depth, config.inner, config.state_size),
    }
    return language_model(build, vocab_size=config.vocab_size, states=states, step=step, source=_SOURCE, layouts=_layouts(config))


@register_model(
    "mamba-tiny",
    MambaConfig(vocab_size=64, hidden_size=32, depth=2, state_size=4),
    summary="Mamba with 2 layers of width 32, prefill with states, for trying",
)
@register_model("mamba-130m", MambaConfig(), summary="Mamba-130M, prefill with states")
@register_model("mamba-370m", MambaConfig(hidden_size=1024, depth=48), summary="Mamba-370M, prefill with states")
@register_model("mamba-790m", MambaConfig(hidden_size=1536, depth=48), summary="Mamba-790M, prefill with states")
@register_model("mamba-1.4b", MambaConfig(hidden_size=2048, depth=48), summary="Mamba-1.4B, prefill with states")
@register_model("mamba-2.8b", MambaConfig(hidden_size=2560, depth=64), summary="Mamba-2.8B, prefill with states")
def mamba(config: MambaConfig) -> ModelSpec:
    """A Mamba language model over a sequence."""
    return _model(config, step=False)


@register_model(
    "mamba-step-tiny",
    MambaConfig(vocab_size=64, hidden_size=32, depth=2, state_size=4),
    summary="One token of mamba-tiny, with states",
)
@register_model("mamba-step-130m", MambaConfig(), summary="One token of Mamba-130M, with states")
@register_model("mamba-step-370m", MambaConfig(hidden_size=1024, depth=48), summary="One token of Mamba-370M, with states")
@register_model("mamba-step-790m", MambaConfig(hidden_size=1536, depth=48), summary="One token of Mamba-790M, with states")
@register_model("mamba-step-1.4b", MambaConfig(hidden_size=2048, depth=48), summary="One token of Mamba-1.4B, with states")
@register_model("mamba-step-2.8b", MambaConfig(hidden_size=2560, depth=64), summary="One token of Mamba-2.8B, with states")
def mamba_step(config: MambaConfig) -> ModelSpec:
    """A Mamba language model, one token at a time."""
    return _model(config, step=True)
