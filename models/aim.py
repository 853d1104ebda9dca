"""AiM: pictures drawn token by token by a Mamba language model, conditioned on a class (Li et al., arXiv:2408.12245).

A picture is num_tokens codes of a VQ tokenizer in raster order. The sequence is the class, embedded, then the codes, each embedded with its
position; what stands at each place predicts the next code. The blocks are Mamba-2's, on a stream that the class modulates (adaLN):

    x = x + gate * mixer(norm(x) (1 + scale) + shift)
    logits = head(norm_final(norm_f(x)) (1 + scale') + shift')

shift, scale and gate of a layer come from the class by a projection of its own in AiM-B, and by adaLN-group in AiM-L and AiM-XL: one
projection for each of `groups` groups, layer i in group i mod `groups`, plus a learned table of each layer. The head is the transposed
embedding of the codes.

Checked against the authors' code (hp-l33/AiM, commit 0a91c60), whose parameter names are kept without the prefix `mamba.`; the published
files hold the tokenizer too (`vqvae.`), which is left aside. Of the paper's sizes, the 1.3 B one is in neither the code nor the model zoo.

What needs saying:

- **Which Mamba.** The paper says Mamba; the code of the released models has Mamba-2's blocks with the defaults of mamba-ssm (state 128,
  heads of 64), which also gives their published numbers of parameters, 148, 350 and 763 M; Mamba-1's would give 353 M for AiM-L.
- **Place of the class.** The class is a place of the sequence like the codes: position -1, where the code is ignored. A prompt starts with
  it, and so does drawing from nothing, which is then a loop over one graph.
- **Positions.** The authors' training counts codes from 0, and their generation from 1, so that a code is looked up beside the place it was
  trained at. Positions are inputs here; `TokenSampler` counts from 0, and from 1 with `first_position=1`.
- **Guidance.** Label num_classes stands for "no class"; conditional and unconditional rows are rows of one batch, which `TokenSampler`
  combines, as in the authors' `generate`. It is no `Sampler`: what it draws are codes, which become a picture in a VQ decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import Arrays, ModelSpec, SizeRange, StateDictLayout, register_model
from ..exporter.weights import same_in_all
from .layers import LabelEmbedder, RMSNorm, modulate
from .mamba import scale_residual_branches
from .mamba2 import Mamba2Block

Array = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

START = -1
"""The position of the class."""


@dataclass(frozen=True)
class AiMConfig:
    """Settings of an AiM.

    Attributes:
        vocab_size: Codes of the tokenizer.
        num_tokens: Codes of a picture, and with one more the positions that have an embedding.
        num_classes: Number of classes; label `num_classes` stands for "no class".
        hidden_size: D, width of the residual stream.
        depth: Number of layers.
        groups: Groups of adaLN-group; 0 gives each layer a projection of its own.
        expand: E / D, width inside a block over that of the stream.
        head_size: Channels of a head of Mamba-2's; divides E.
        state_size: State of the scan per channel.
        conv_size: Width of the causal convolution, at least 2.
        norm_eps: Epsilon of the norms.
    """

    vocab_size: int = 16384
    num_tokens: int = 256
    num_classes: int = 1000
    hidden_size: int = 768
    depth: int = 24
    groups: int = 0
    expand: int = 2
    head_size: int = 64
    state_size: int = 128
    conv_size: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_tokens", "num_classes", "hidden_size", "depth", "expand", "head_size", "state_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.groups < 0:
            raise ValueError(f"groups must be at least 0, got {self.groups}")
        if self.conv_size < 2:
            raise ValueError(f"conv_size must be at least 2, got {self.conv_size}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be above 0, got {self.norm_eps}")
        if self.inner % self.head_size:
            raise ValueError(f"head_size must divide expand * hidden_size = {self.inner}, got {self.head_size}")

    @property
    def inner(self) -> int:
        """E, width inside a block."""
        return self.expand * self.hidden_size

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the states of all layers, without the batch."""
        return {
            "conv_states": (self.depth, self.inner + 2 * self.state_size, self.conv_size - 1),
            "ssm_states": (self.depth, self.inner // self.head_size, self.state_size, self.head_size),
        }


class CodeEmbeddings(nn.Module):
    """Embeddings of codes and of their positions, added."""

    def __init__(self, config: AiMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.num_tokens + 1, config.hidden_size)
        nn.init.normal_(self.word_embeddings.weight, std=0.02)
        nn.init.normal_(self.position_embeddings.weight, std=0.02)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Codes and positions (…), int64, to (…, D); a position below 0 is looked up as 0."""
        out: Tensor = self.word_embeddings(tokens) + self.position_embeddings(positions.clamp(min=0))
        return out


class AiMLayer(nn.Module):
    """A modulated and gated block on the residual stream."""

    def __init__(self, config: AiMConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm = RMSNorm(width, config.norm_eps)
        self.mixer = Mamba2Block(
            width,
            state_size=config.state_size,
            conv_size=config.conv_size,
            expand=config.expand,
            head_size=config.head_size,
            norm_eps=config.norm_eps,
        )
        if config.groups:
            self.scale_shift_table = nn.Parameter(torch.randn(1, 3, width) / width**0.5)
        else:
            self.adaLN_modulation = _from_zero(width, 3)

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, scale and gate (B, D) from the class (B, D), or with groups from its group's part (B, 3, D)."""
        if condition.ndim == 3:
            shift, scale, gate = (condition + self.scale_shift_table).unbind(1)
        else:
            shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=1)
        return shift, scale, gate

    def forward(self, x: Tensor, condition: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stream (B, L, D), the class and the states, to the stream and the states."""
        shift, scale, gate = self.modulation(condition)
        y, conv_state, ssm_state = self.mixer(modulate(self.norm(x), shift, scale), conv_state, ssm_state)
        return x + gate.unsqueeze(1) * y, conv_state, ssm_state

    def step(self, x: Tensor, condition: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One place (B, D) of the stream, the class and the states, to the stream and the states."""
        shift, scale, gate = self.modulation(condition)
        y, conv_state, ssm_state = self.mixer.step(self.norm(x) * (1 + scale) + shift, conv_state, ssm_state)
        return x + gate * y, conv_state, ssm_state


class FinalLayer(nn.Module):
    """A modulated norm, the second after the last layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width, 1e-5)
        self.adaLN_modulation = _from_zero(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """X (B, L, D) or (B, D) and the class (B, D), to x's shape."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        if x.ndim == 3:
            return modulate(self.norm_final(x), shift, scale)
        out: Tensor = self.norm_final(x) * (1 + scale) + shift
        return out


class AiMBackbone(nn.Module):
    """Embeddings, layers and norms: codes and classes to vectors that the head reads."""

    def __init__(self, config: AiMConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.groups = config.groups
        self.embeddings = CodeEmbeddings(config)
        self.cls_embed = LabelEmbedder(config.num_classes, width)
        nn.init.normal_(self.cls_embed.embedding_table.weight, std=0.02)
        self.adaln_group = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * config.groups * width)) if config.groups else nn.Identity()
        self.final_layer = FinalLayer(width)
        self.layers = nn.ModuleList(AiMLayer(config) for _ in range(config.depth))
        self.norm_f = RMSNorm(width, config.norm_eps)

    def forward(
        self, y: Tensor, tokens: Tensor, positions: Tensor, conv_states: Tensor, ssm_states: Tensor, *, step: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes places (B, L), or with `step` one (B,); the rest is as in `AiM`, with vectors for logits."""
        label = self.cls_embed(y)  # (B, D)
        start = label if step else label.unsqueeze(1)
        h = torch.where((positions == START).unsqueeze(-1), start, self.embeddings(tokens, positions))
        conditions = [label]
        if self.groups:
            conditions = list(self.adaln_group(label).unflatten(1, (3 * self.groups, -1)).chunk(self.groups, dim=1))
        conv_after, ssm_after = [], []
        layers = cast("list[AiMLayer]", self.layers)
        for i, (layer, conv_state, ssm_state) in enumerate(zip(layers, conv_states.unbind(1), ssm_states.unbind(1), strict=True)):
            condition = conditions[i % len(conditions)]
            h, conv, ssm = (layer.step if step else layer)(h, condition, conv_state, ssm_state)
            conv_after.append(conv)
            ssm_after.append(ssm)
        return self.final_layer(self.norm_f(h), label), torch.stack(conv_after, dim=1), torch.stack(ssm_after, dim=1)


class AiM(nn.Module):
    """The network over a sequence."""

    def __init__(self, config: AiMConfig) -> None:
        super().__init__()
        self.backbone = AiMBackbone(config)
        scale_residual_branches([layer.get_submodule("mixer") for layer in self.backbone.layers])

    def forward(
        self, y: Tensor, tokens: Tensor, positions: Tensor, conv_states: Tensor, ssm_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts the code after each place.

        Args:
            y: Labels (B,), int64, in [0, num_classes]; num_classes stands for "no class".
            tokens: Codes (B, L), int64, in [0, vocab_size).
            positions: Their positions (B, L), int64, in [0, num_tokens], or -1 for the class, with which a sequence begins.
            conv_states: The last conv_size - 1 inputs of each layer's convolution (B, depth, channels, conv_size - 1), float32; zeros
                at first.
            ssm_states: The state of each layer's scan (B, depth, heads, N, P), float32; zeros at first.

        Returns:
            Logits (B, L, vocab_size), and the states after the last place.
        """
        h, conv_states, ssm_states = self.backbone(y, tokens, positions, conv_states, ssm_states)
        return F.linear(h, self.backbone.embeddings.word_embeddings.weight), conv_states, ssm_states


class AiMStep(AiM):
    """The network, one place at a time, with the same weights."""

    def forward(self, y: Tensor, token: Tensor, position: Tensor, conv_states: Tensor, ssm_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts the code after `token` (B,) at `position` (B,): logits (B, vocab_size), and the states, shaped as in `AiM`."""
        h, conv_states, ssm_states = self.backbone(y, token, position, conv_states, ssm_states, step=True)
        return F.linear(h, self.backbone.embeddings.word_embeddings.weight), conv_states, ssm_states


def _from_zero(width: int, parts: int) -> nn.Sequential:
    linear = nn.Linear(width, parts * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


@dataclass(frozen=True)
class TokenSampler:
    """Draws the codes of pictures through the step, on the host, so that PyTorch and every artifact run the same loop.

    Attributes:
        labels: The class of each picture.
        num_tokens: Codes of a picture.
        states: Shapes of the states without the batch, `AiMConfig.states`.
        null_label: The label that stands for "no class".
        guidance: Weight of the class's logits against those without class; 1 is none, and needs half the rows.
        top_k: Codes that are drawn from, the likeliest ones; 1 always takes the likeliest, 0 all.
        temperature: Divides the logits.
        first_position: The position of the first code.
    """

    labels: tuple[int, ...]
    num_tokens: int
    states: Mapping[str, tuple[int, ...]]
    null_label: int
    guidance: float = 1.0
    top_k: int = 0
    temperature: float = 1.0
    first_position: int = 0

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("labels must name at least one picture, got none")
        if self.guidance < 1:
            raise ValueError(f"guidance must be at least 1, got {self.guidance}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    @property
    def batch(self) -> int:
        """Rows of each call."""
        return len(self.labels) * (2 if self.guidance > 1 else 1)

    def __call__(self, step: Callable[[Arrays], Arrays], rng: np.random.Generator) -> Array:
        """Draws (pictures, num_tokens) codes, int64.

        Args:
            step: One call of the step: inputs by name to outputs by name.
            rng: The only source of randomness; one number a picture and code.
        """
        pictures = len(self.labels)
        y: Array = np.asarray(self.labels, np.int64)
        if self.guidance > 1:
            y = np.concatenate([y, np.full_like(y, self.null_label)])
        states = {name: np.zeros((self.batch, *shape), np.float32) for name, shape in self.states.items()}
        token: Array = np.zeros(pictures, np.int64)  # ignored beside the class
        drawn = np.empty((pictures, self.num_tokens), np.int64)
        for i in range(self.num_tokens):
            position = START if i == 0 else self.first_position + i - 1
            rows = {"y": y, "token": np.resize(token, self.batch), "position": np.full(self.batch, position, np.int64)}
            out = step({**rows, **states})
            states = {name: out[f"last_{name}"] for name in states}
            logits = out["logits"].astype(np.float64)
            if self.guidance > 1:
                with_class, without = logits[:pictures], logits[pictures:]
                logits = without + self.guidance * (with_class - without)
            drawn[:, i] = token = self.choose(logits, rng)
        return drawn

    def choose(self, logits: np.ndarray[tuple[int, ...], np.dtype[np.float64]], rng: np.random.Generator) -> Array:
        """One code of each row of logits (pictures, vocab_size), int64 (pictures,)."""
        if self.top_k == 1:
            likeliest: Array = logits.argmax(1)
            return likeliest
        scaled = (logits - logits.max(1, keepdims=True)) / self.temperature
        if 0 < self.top_k < logits.shape[1]:
            smallest = np.partition(scaled, -self.top_k, axis=1)[:, -self.top_k, None]
            scaled = np.where(scaled < smallest, -np.inf, scaled)
        cumulative = np.exp(scaled).cumsum(1)
        total = cumulative[:, -1:]
        # Strictly below the total, which the product could round to: then no code of probability 0 is drawn.
        threshold = np.minimum(rng.random((len(logits), 1)) * total, np.nextafter(total, 0))
        chosen: Array = (cumulative <= threshold).sum(1)
        return chosen


def _layout() -> StateDictLayout:
    embedding, head = "backbone.embeddings.word_embeddings.weight", "lm_head.weight"

    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ours = {key: key.removeprefix("mamba.") for key in state if not key.startswith("vqvae.")}
        converted = {name: state[key] for key, name in ours.items() if name not in (embedding, head)}
        tied = [key for wanted in (embedding, head) for key, name in ours.items() if name == wanted]
        if tied:
            same_in_all(state, tied, converted, embedding)
        return converted

    return StateDictLayout("hp-l33/AiM", lambda keys: "mamba.backbone.cls_embed.embedding_table.weight" in keys, convert)


def _model(config: AiMConfig, *, step: bool) -> ModelSpec:
    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = sizes["batch"]
        drawn = {"y": torch.from_numpy(rng.integers(0, config.num_classes, batch, endpoint=True))}
        if step:
            drawn["token"] = torch.from_numpy(rng.integers(0, config.vocab_size, batch))
            drawn["position"] = torch.from_numpy(rng.integers(START, config.num_tokens, batch))
        else:
            drawn["tokens"] = torch.from_numpy(rng.integers(0, config.vocab_size, (batch, sizes["length"])))
            drawn["positions"] = torch.arange(START, sizes["length"] - 1).repeat(batch, 1)
        for name, rest in config.states.items():
            drawn[name] = torch.from_numpy(rng.standard_normal((batch, *rest), dtype=np.float32))
        return drawn

    longest = config.num_tokens + 1
    sequence = {} if step else {"length": min(16, longest)}
    places = {0: "batch"} if step else {0: "batch", 1: "length"}
    names = ("token", "position") if step else ("tokens", "positions")
    return ModelSpec(
        build=lambda: (AiMStep if step else AiM)(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, **sequence},
        dynamic={"y": {0: "batch"}, **dict.fromkeys(names, places), **{name: {0: "batch"} for name in config.states}},
        ranges={"batch": SizeRange(1, 2, 32), **({} if step else {"length": SizeRange(1, min(64, longest), longest)})},
        outputs=("logits", *(f"last_{name}" for name in config.states)),
        source="Li et al., Scalable Autoregressive Image Generation with Mamba, arXiv:2408.12245; read beside the authors' hp-l33/AiM",
        layouts=(_layout(),),
    )


@register_model(
    "aim-tiny",
    AiMConfig(vocab_size=64, num_tokens=64, num_classes=10, hidden_size=32, depth=2, groups=2, head_size=16, state_size=8),
    summary="AiM with 2 layers of width 32, codes of a picture with states, for trying",
)
@register_model("aim-b", AiMConfig(), summary="AiM-B, 148 M parameters, 256 codes of a 256x256 picture, with states")
@register_model("aim-l", AiMConfig(hidden_size=1024, depth=48, groups=4), summary="AiM-L, 350 M parameters, 256 codes, with states")
@register_model("aim-xl", AiMConfig(hidden_size=1536, depth=48, groups=4), summary="AiM-XL, 763 M parameters, 256 codes, with states")
def aim(config: AiMConfig) -> ModelSpec:
    """An AiM over a sequence of codes."""
    return _model(config, step=False)


@register_model(
    "aim-step-tiny",
    AiMConfig(vocab_size=64, num_tokens=64, num_classes=10, hidden_size=32, depth=2, groups=2, head_size=16, state_size=8),
    summary="One code of aim-tiny, with states",
)
@register_model("aim-step-b", AiMConfig(), summary="One code of AiM-B, with states")
@register_model("aim-step-l", AiMConfig(hidden_size=1024, depth=48, groups=4), summary="One code of AiM-L, with states")
@register_model("aim-step-xl", AiMConfig(hidden_size=1536, depth=48, groups=4), summary="One code of AiM-XL, with states")
def aim_step(config: AiMConfig) -> ModelSpec:
    """An AiM, one code at a time."""
    return _model(config, step=True)
