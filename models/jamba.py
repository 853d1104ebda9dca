"""Jamba: a language model of Mamba layers, a few attention layers, and mixtures of experts (Lieber et al., arXiv:2403.19887; 1.5:
Jamba Team, arXiv:2408.12570).

Each layer mixes tokens, then channels, both behind an RMSNorm and added to the stream::

    x = x + mixer(norm(x))         attention in layer i when i mod 8 = 4, Mamba otherwise (1 : 7)
    x = x + mlp(norm(x))           a mixture of 16 experts, 2 a token, when i is odd, one SwiGLU layer otherwise

Of the 2 n sublayers 43.75 % are Mamba, 6.25 % attention and 50 % MLPs, a quarter of all mixtures. The attention has grouped queries and no
positions: the Mamba layers know the order. The Mamba-1 block has RMSNorms of its own on dt, B and C. The weights of the chosen experts are
their probabilities among all, not divided by their sum.

The survey's sketch gives the same shares (43 % Mamba, 7 % attention, 50 % MLP) and reads them as kinds of layers, in three zones with most
attention in the middle and MLPs at the end. In the published models they are shares of sublayers, and the plan repeats every 8 layers.

Two forms share the weights. The prefill takes a prompt and returns, besides the logits, what the step needs: keys and values of the
attention layers, which grow with the tokens, and the states of the Mamba layers, which do not. The step takes one token with these and
returns them with its own. Each is stacked over its layers on axis 1. In the prefill the mixtures are in their dense form, in the step the
experts are gathered (see `moe`).

Checked against transformers' JambaForCausalLM. `jamba-1.5-mini` has the size of the released Jamba and Jamba 1.5 Mini (52 G parameters),
`jamba-1.5-large` that of Jamba 1.5 Large (398 G). Sequences may have up to `context` tokens, 256 K in the released models; an engine that
is built for every length up to there needs the memory of the longest, and `--dynamic` gives a shorter range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model
from .layers import RMSNorm, SwiGLU
from .mamba import Mamba1Block
from .moe import GatheredMoE, MoEConfig, SparseMoE, stack_experts
from .softmax_attention import SoftmaxAttention, SoftmaxAttentionConfig


@dataclass(frozen=True)
class JambaConfig:
    """Settings of a Jamba.

    Attributes:
        vocab_size: Tokens that are told apart.
        hidden_size: D, width of the stream; a multiple of `num_heads`.
        mlp_size: Hidden channels of an MLP and of an expert.
        depth: Layers; at least one of each kind of mixer.
        num_heads: Heads of queries.
        num_kv_heads: Heads of keys and values.
        attn_period: One of so many layers has attention.
        attn_offset: The first that has.
        num_experts: Experts of a mixture.
        top_k: Experts that a token goes through.
        expert_period: One of so many layers has a mixture.
        expert_offset: The first that has.
        state_size: N of the Mamba blocks.
        conv_size: Width of their convolution.
        expand: Their inner width over D.
        dt_rank: Their rank of the step size; 0 stands for ceil(D / 16), as published.
        norm_eps: Epsilon of all norms.
        context: The most tokens of a sequence; 256 K, as published.
    """

    vocab_size: int = 65536
    hidden_size: int = 4096
    mlp_size: int = 14336
    depth: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    attn_period: int = 8
    attn_offset: int = 4
    num_experts: int = 16
    top_k: int = 2
    expert_period: int = 2
    expert_offset: int = 1
    state_size: int = 16
    conv_size: int = 4
    expand: int = 2
    dt_rank: int = 0
    norm_eps: float = 1e-6
    context: int = 262144

    def __post_init__(self) -> None:
        for name, least in (
            ("context", 2),
            ("vocab_size", 1),
            ("mlp_size", 1),
            ("state_size", 1),
            ("conv_size", 2),
            ("expand", 1),
            ("dt_rank", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if min(self.hidden_size, self.num_heads) < 1 or self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, got {self.hidden_size} and {self.num_heads} heads")
        for name in ("attn", "expert"):
            period, offset = getattr(self, f"{name}_period"), getattr(self, f"{name}_offset")
            if not 0 <= offset < period:
                raise ValueError(f"{name}_offset must be at least 0 and below {name}_period, got {offset} and {period}")
        if not 0 < len(self.attention_layers) < self.depth:
            raise ValueError(
                f"depth must give a layer of attention and one of Mamba, got {self.depth} layers of which "
                f"{len(self.attention_layers)} have attention"
            )

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers with attention; the others have Mamba."""
        return tuple(range(self.attn_offset, self.depth, self.attn_period))

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The layers with a mixture of experts; the others have one MLP."""
        return tuple(range(self.expert_offset, self.depth, self.expert_period))

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_heads


class JambaMamba(Mamba1Block):
    """A Mamba-1 block whose dt, B and C are normed."""

    def __init__(self, config: JambaConfig) -> None:
        rank = config.dt_rank or math.ceil(config.hidden_size / 16)
        super().__init__(config.hidden_size, state_size=config.state_size, conv_size=config.conv_size, expand=config.expand, dt_rank=rank)
        self.dt_layernorm = RMSNorm(rank, config.norm_eps)
        self.b_layernorm = RMSNorm(config.state_size, config.norm_eps)
        self.c_layernorm = RMSNorm(config.state_size, config.norm_eps)

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `MambaCore.select`."""
        dt, B, C = torch.split(self.x_proj(u), list(self.splits), dim=-1)
        return F.linear(self.dt_layernorm(dt), self.dt_proj.weight), self.b_layernorm(B), self.c_layernorm(C)


class JambaLayer(nn.Module):
    """A mixer and an MLP."""

    def __init__(self, config: JambaConfig, index: int, mixture: type[SparseMoE]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer: JambaMamba | SoftmaxAttention
        if index in config.attention_layers:
            self.mixer = SoftmaxAttention(
                SoftmaxAttentionConfig(
                    hidden_size=config.hidden_size,
                    num_heads=config.num_heads,
                    num_kv_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                    rope_base=0.0,
                )
            )
        else:
            self.mixer = JambaMamba(config)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        if index in config.expert_layers:
            self.feed_forward: nn.Module = mixture(
                MoEConfig(config.hidden_size, config.mlp_size, config.num_experts, config.top_k, normalize=False)
            )
        else:
            self.feed_forward = SwiGLU(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stream (B, L, D) to the same, and keys and values, or the states of convolution and scan."""
        mixed, first, second = self.mixer(self.input_layernorm(x))
        x = x + mixed
        return x + self.feed_forward(self.pre_ff_layernorm(x)), first, second

    def step(self, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token (B, D) and what `forward` returned for those before it, to the same."""
        normed = self.input_layernorm(x)
        if isinstance(self.mixer, JambaMamba):
            mixed, first, second = self.mixer.step(normed, first, second)
        else:
            q, k, v = self.mixer.project(normed.unsqueeze(1), 0, 1)
            first, second = torch.cat([first, k], dim=2), torch.cat([second, v], dim=2)
            mixed = self.mixer.attend(q, first, second, causal=False).squeeze(1)
        x = x + mixed
        return x + self.feed_forward(self.pre_ff_layernorm(x)), first, second


class Jamba(nn.Module):
    """The language model over a sequence."""

    mixture: type[SparseMoE] = SparseMoE

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(JambaLayer(config, i, self.mixture) for i in range(config.depth))
        self.final_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Predicts the token after each.

        Args:
            tokens: (B, L), int64, in [0, vocab_size).

        Returns:
            Logits (B, L, vocab_size); keys and values of the attention layers (B, attention layers, kv heads, L, head size); and the states
            after the last token of the Mamba layers, (B, Mamba layers, channels, conv_size - 1) and (B, Mamba layers, channels, N).
        """
        h = self.embed_tokens(tokens)
        kept = []
        for layer in self.layers:
            h, first, second = layer(h)
            kept.append((first, second))
        return self._outputs(h, kept)

    def _outputs(self, h: Tensor, kept: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        attention = [kept[i] for i in self.config.attention_layers]
        mamba = [pair for i, pair in enumerate(kept) if i not in self.config.attention_layers]
        keys, values, conv, ssm = (torch.stack([pair[side] for pair in group], dim=1) for group in (attention, mamba) for side in (0, 1))
        return self.lm_head(self.final_layernorm(h)), keys, values, conv, ssm


class JambaStep(Jamba):
    """The language model, one token at a time, with the same weights."""

    mixture = GatheredMoE

    def forward(  # type: ignore[override]  # the other form
        self, token: Tensor, keys: Tensor, values: Tensor, conv_states: Tensor, ssm_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Predicts the token after `token` (B,), int64.

        Args:
            token: The token.
            keys: Those of the T tokens before it, as the prefill returns them, with T in place of L.
            values: As the keys.
            conv_states: As the prefill returns them.
            ssm_states: As the prefill returns them.

        Returns:
            Logits (B, vocab_size); keys and values with those of this token after them, T + 1 of each; and the states after it.
        """
        h = self.embed_tokens(token)
        kept = []
        attention, mamba = 0, 0
        for layer in self.layers:
            if isinstance(layer.mixer, JambaMamba):
                h, first, second = cast("JambaLayer", layer).step(h, conv_states[:, mamba], ssm_states[:, mamba])
                mamba += 1
            else:
                h, first, second = cast("JambaLayer", layer).step(h, keys[:, attention], values[:, attention])
                attention += 1
            kept.append((first, second))
        return self._outputs(h, kept)


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From the released files, whose experts are stored one by one, or from what transformers holds in memory, where they are stacked."""
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        name = re.sub(r"\.(?:mamba|self_attn)\.", ".mixer.", key.removeprefix("model."))
        moe = re.fullmatch(r"(layers\.\d+\.feed_forward\.)(router\.weight|experts\.(?:gate_up_proj|down_proj|(\d+)\..+))", name)
        if moe is None:
            converted[name] = value
        elif moe[2] == "router.weight":
            converted[f"{moe[1]}gate.weight"] = value
        elif moe[3] is None:
            converted[moe[1] + moe[2].removeprefix("experts.")] = value.mT if moe[2].endswith("down_proj") else value
        elif f"{moe[1]}down_proj" not in converted and key not in converted:
            prefix = key[: -len(moe[2])] + "experts."
            stack_experts(state, prefix, ("gate_proj", "up_proj", "down_proj"), converted, moe[1])
    return converted


def _layout(config: JambaConfig) -> StateDictLayout:
    return StateDictLayout(
        "transformers",
        lambda keys: "model.embed_tokens.weight" in keys,
        _from_transformers,
        config={
            "model_type": "jamba",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.mlp_size,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "attn_layer_period": config.attn_period,
            "attn_layer_offset": config.attn_offset,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.top_k,
            "expert_layer_period": config.expert_period,
            "expert_layer_offset": config.expert_offset,
            "mamba_d_state": config.state_size,
            "mamba_d_conv": config.conv_size,
            "mamba_expand": config.expand,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": False,
        },
    )


_SOURCE = "Lieber et al., Jamba, arXiv:2403.19887; Jamba-1.5, arXiv:2408.12570; checked against transformers' JambaForCausalLM"


@register_model(
    "jamba-tiny",
    JambaConfig(
        vocab_size=64,
        hidden_size=64,
        mlp_size=48,
        depth=3,
        num_heads=4,
        num_kv_heads=2,
        attn_period=3,
        attn_offset=1,
        num_experts=4,
        state_size=4,
        dt_rank=4,
        context=4096,
    ),
    summary="Jamba with 3 layers of width 64 (Mamba, attention with experts, Mamba), prefill, for trying",
)
@register_model("jamba-1.5-mini", JambaConfig(), summary="Jamba 1.5 Mini, 52 G parameters, prefill")
@register_model(
    "jamba-1.5-large",
    JambaConfig(hidden_size=8192, mlp_size=24576, depth=72, num_heads=64),
    summary="Jamba 1.5 Large, 398 G parameters, prefill",
)
def jamba(config: JambaConfig) -> ModelSpec:
    """A Jamba over a prompt."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"tokens": torch.from_numpy(rng.integers(0, config.vocab_size, (sizes["batch"], sizes["length"])))}

    return ModelSpec(
        build=lambda: Jamba(config).eval(),
        inputs=inputs,
        # A few tokens, none of which stands between two experts within the error of half precision.
        sizes={"batch": 2, "length": min(7, config.context)},
        dynamic={"tokens": {0: "batch", 1: "length"}},
        ranges={"batch": SizeRange(1, 2, 16), "length": SizeRange(1, min(16, config.context), config.context)},
        outputs=("logits", "keys", "values", "conv_states", "ssm_states"),
        source=_SOURCE,
        layouts=(_layout(config),),
    )


@register_model(
    "jamba-step-tiny",
    JambaConfig(
        vocab_size=64,
        hidden_size=64,
        mlp_size=48,
        depth=3,
        num_heads=4,
        num_kv_heads=2,
        attn_period=3,
        attn_offset=1,
        num_experts=4,
        state_size=4,
        dt_rank=4,
        context=4096,
    ),
    summary="One token of jamba-tiny, with its cache and states",
)
@register_model("jamba-step-1.5-mini", JambaConfig(), summary="One token of Jamba 1.5 Mini, with its cache and states")
def jamba_step(config: JambaConfig) -> ModelSpec:
    """A Jamba for one token."""

    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch, attention = sizes["batch"], len(config.attention_layers)
        cache = (batch, attention, config.num_kv_heads, sizes["past"], config.head_dim)
        mamba = (batch, config.depth - attention, config.expand * config.hidden_size)
        shapes = {
            "keys": cache,
            "values": cache,
            "conv_states": (*mamba, config.conv_size - 1),
            "ssm_states": (*mamba, config.state_size),
        }
        drawn = {"token": torch.from_numpy(rng.integers(0, config.vocab_size, batch))}
        return drawn | {name: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}

    states = ("keys", "values", "conv_states", "ssm_states")
    return ModelSpec(
        build=lambda: JambaStep(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "past": min(5, config.context - 1)},
        dynamic={
            "token": {0: "batch"},
            **{name: {0: "batch", 3: "past"} for name in states[:2]},
            **{name: {0: "batch"} for name in states[2:]},
        },
        # The token that is given is one more.
        ranges={"batch": SizeRange(1, 2, 16), "past": SizeRange(1, min(5, config.context - 1), config.context - 1)},
        outputs=("logits", *(f"next_{name}" for name in states)),
        source=_SOURCE,
        layouts=(_layout(config),),
    )
