"""Early exit: a transformer with a classifier after every layer, that stops at the first one that is sure (dynamic depth).

DeeBERT (Xin et al., arXiv:2004.12993): BERT (Devlin et al., arXiv:1810.04805) with an exit behind each of its n layers, which is BERT's
pooler and classifier over again::

    h_i = layer_i(h_{i-1})        z_i = W_i tanh(P_i h_i[first token])        stop at the first i with entropy(softmax(z_i)) < S, or at n

The sureness of an exit is written as confidence = 1 / (1 + entropy) here, in (0, 1], as in the survey that this file follows in it; the
paper's S is threshold = 1 / (1 + S). For a batch the decision is one for all: **the batch stops when the mean of its confidences exceeds
the threshold**, which for one sequence is the paper's rule (the paper measures with batches of one). The layers up to the exit are computed
for every sequence, and `exit`, the number of layers computed (1 to n), is an output.

Differences, and why: the survey's sketch takes the entropy of a softmax over the hidden channels, which is no probability of anything, and
compares it before any classifier has been asked; here, as in DeeBERT and before it in BranchyNet (Teerapittayanon et al., 1709.01686),
it is that of the classifier's own distribution. DeeBERT's code asks an exit after layer n too, which the paper does not have and whose
weights are never trained: exit n is BERT's own classifier, and asked unconditionally. There is no padding: a batch's sequences are of one
length.

**Two forms** with equal weights and outputs. `early-exit` is control flow: each further layer is a branch (`torch.cond`, ONNX' If) that is
entered while no exit was sure, so that the layers behind the exit are not computed. The branches stand one after the other, and not one in
the other, so that the depth of nesting does not grow with n; a branch not taken hands on what it was given. `early-exit-all` computes all
exits and selects: no time is saved, but it runs where there is no control flow, and on hardware that does not branch.

Checked against transformers' BertForSequenceClassification of as many layers as the exit taken; `early-exit-bert-base` has DeeBERT's size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exporter.spec import ModelSpec, SizeRange, StateDictLayout, register_model


@dataclass(frozen=True)
class EarlyExitConfig:
    """Settings of an early-exit transformer.

    Attributes:
        vocab_size: Tokens that are told apart.
        hidden_size: Channels of a token; a multiple of `num_heads`.
        depth: n, layers and exits, at least 2.
        num_heads: Attention heads.
        mlp_size: Channels inside the MLP.
        max_length: Positions, and the longest sequence.
        num_classes: Classes of each classifier, at least 2.
        threshold: Confidence above which an exit is taken, in (0, 1]; 1 never leaves early.
        norm_eps: Epsilon of the layer norms.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    max_length: int = 512
    num_classes: int = 2
    threshold: float = 0.9
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 1), ("hidden_size", 1), ("depth", 2), ("num_heads", 1), ("mlp_size", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, got {self.hidden_size} and {self.num_heads} heads")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold}")


class Embeddings(nn.Module):
    """BERT's: word, position and (always the first) token type, normed: (B, L) int64 to (B, L, D)."""

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_length, config.hidden_size)
        self.token_type = nn.Embedding(2, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """The first layer's input."""
        out: Tensor = self.norm(self.word(tokens) + self.position.weight[: tokens.shape[1]] + self.token_type.weight[0])
        return out


class Layer(nn.Module):
    """BERT's: attention and MLP, each added and then normed. (B, L, D) in and out."""

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.fc1 = nn.Linear(dim, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, dim)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Every token sees all."""
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = self.norm1(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        out: Tensor = self.norm2(x + self.fc2(F.gelu(self.fc1(x))))
        return out


class Exit(nn.Module):
    """A pooler and a classifier: (B, L, D) to (B, num_classes)."""

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_classes)
        # With torch's or BERT's small weights every exit starts out as unsure as the next, whatever the input.
        nn.init.normal_(self.classifier.weight, std=4 * config.hidden_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, from the first token."""
        out: Tensor = self.classifier(torch.tanh(self.pooler(x[:, 0])))
        return out


def confidence(logits: Tensor) -> Tensor:
    """The mean over a batch of 1 / (1 + entropy), for logits (B, num_classes): a scalar, computed in float32."""
    logs = F.log_softmax(logits.float(), dim=-1)
    entropy = -(logs.exp() * logs).sum(-1)
    return (1 / (1 + entropy)).mean()


class EarlyExit(nn.Module):
    """The network with branches; see the module's text."""

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        self.threshold = config.threshold
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.exits = nn.ModuleList(Exit(config) for _ in range(config.depth))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Computes as many layers as are needed.

        Args:
            tokens: (B, L), int64, in [0, vocab_size), the first token of each sequence being the one that is classified.

        Returns:
            The logits of the exit taken (B, num_classes), and its number (1,), int64, from 1 to the depth.
        """
        h, logits, done = self._compute(0, self.embeddings(tokens))
        number = torch.ones(1, dtype=torch.int64, device=tokens.device)
        for i in range(1, len(self.layers)):
            h, logits, done, number = self._go_on(i, h, logits, done, number)
        return logits, number

    def _compute(self, i: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.layers[i](h)
        logits = self.exits[i](h)
        return h, logits, confidence(logits) > self.threshold

    def _go_on(self, i: int, h: Tensor, logits: Tensor, done: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def stop(h: Tensor, logits: Tensor, done: Tensor) -> tuple[Tensor, ...]:
            return h.clone(), logits.clone(), done.clone()  # what a branch returns may not be what it was given

        def compute(h: Tensor, logits: Tensor, done: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG001 - the branches' shape
            h, further, sure = self._compute(i, h)
            # Without the reshape torch.export 2.13 takes the two branches' batches for two sizes, and asserts that theirs is 2 or more.
            return h, further.reshape(logits.shape), sure

        # The number is counted outside: coreai-core 1.0.0b3 cannot load a condition that chooses between two constants.
        number = torch.where(done, number, number + 1)
        h, logits, done = torch.cond(done, stop, compute, (h, logits, done))
        return h, logits, done, number


class EarlyExitAll(EarlyExit):
    """The network without branches: all exits are computed, and one is selected."""

    def _go_on(self, i: int, h: Tensor, logits: Tensor, done: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, further, sure = self._compute(i, h)
        return h, torch.where(done, logits, further), done | sure, torch.where(done, number, i + 1)


_LAYER_NAMES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "norm2",
}
_EMBEDDINGS = {
    "word_embeddings": "word",
    "position_embeddings": "position",
    "token_type_embeddings": "token_type",
    "LayerNorm": "norm",
}


def _deebert_layout(config: EarlyExitConfig) -> StateDictLayout:
    """DeeBERT's checkpoints; the untrained exit of its code behind the last layer is left out."""
    last = config.depth - 1
    names = {f"bert.embeddings.{theirs}": f"embeddings.{ours}" for theirs, ours in _EMBEDDINGS.items()}
    names |= {"bert.pooler.dense": f"exits.{last}.pooler", "classifier": f"exits.{last}.classifier"}
    for i in range(config.depth):
        names |= {f"bert.encoder.layer.{i}.{theirs}": f"layers.{i}.{ours}" for theirs, ours in _LAYER_NAMES.items()}
        if i < last:
            highway = f"bert.encoder.highway.{i}"
            names |= {f"{highway}.pooler.dense": f"exits.{i}.pooler", f"{highway}.classifier": f"exits.{i}.classifier"}

    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = {}
        for key in state:
            name, _, kind = key.rpartition(".")
            if key == "bert.embeddings.position_ids" or re.match(rf"bert\.encoder\.highway\.{last}\.", key):
                continue
            converted[f"{names[name]}.{kind}" if name in names else key] = state[key]
        return converted

    return StateDictLayout("DeeBERT", lambda keys: "bert.encoder.highway.0.pooler.dense.weight" in keys, convert)


def _spec(config: EarlyExitConfig, module: type[EarlyExit]) -> ModelSpec:
    def inputs(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {"tokens": torch.from_numpy(rng.integers(0, config.vocab_size, (sizes["batch"], sizes["length"])))}

    return ModelSpec(
        build=lambda: module(config).eval(),
        inputs=inputs,
        sizes={"batch": 2, "length": min(6, config.max_length)},
        dynamic={"tokens": {0: "batch", 1: "length"}},
        ranges={"batch": SizeRange(1, 2, 16), "length": SizeRange(1, min(6, config.max_length), config.max_length)},
        outputs=("logits", "exit"),
        source="Xin et al., DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference, arXiv:2004.12993; "
        "checked against transformers' BertForSequenceClassification",
        layouts=(_deebert_layout(config),),
    )


@register_model(
    "early-exit-tiny",
    EarlyExitConfig(vocab_size=32, hidden_size=16, depth=3, num_heads=2, mlp_size=32, max_length=16, num_classes=4, threshold=0.6),
    summary="Transformer with 3 layers and early exits in branches, for trying",
)
@register_model(
    "early-exit-bert-base", EarlyExitConfig(), summary="DeeBERT: BERT-base with 12 exits in branches, 116 M parameters, 2 classes"
)
def early_exit(config: EarlyExitConfig) -> ModelSpec:
    """An early-exit transformer whose layers are branches."""
    return _spec(config, EarlyExit)


@register_model(
    "early-exit-all-tiny",
    EarlyExitConfig(vocab_size=32, hidden_size=16, depth=3, num_heads=2, mlp_size=32, max_length=16, num_classes=4, threshold=0.6),
    summary="Transformer with 3 layers, all exits computed and one selected, for trying",
)
@register_model(
    "early-exit-all-bert-base",
    EarlyExitConfig(),
    summary="DeeBERT: BERT-base with 12 exits, all computed and one selected, 116 M parameters, 2 classes",
)
def early_exit_all(config: EarlyExitConfig) -> ModelSpec:
    """An early-exit transformer without branches, with the same outputs."""
    return _spec(config, EarlyExitAll)
