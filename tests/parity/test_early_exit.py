"""Our early exit against transformers' BERT of as many layers as the exit taken, and DeeBERT's names."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights

from .compare import assert_close, draw


def build_theirs(config, layers):
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_size,
            max_position_embeddings=config.max_length,
            num_labels=config.num_classes,
            layer_norm_eps=config.norm_eps,
            initializer_range=0.3,
        )
    ).eval()


@pytest.mark.parametrize("name", ["early-exit-tiny", "early-exit-all-tiny"])
@pytest.mark.parametrize("settings", [{}, {"hidden_size": 24, "num_heads": 3, "mlp_size": 20, "norm_eps": 1e-3}])
def test_deebert_s_weights_at_every_exit(name, settings, tmp_path):
    spec = MODELS[name].spec(settings)
    config = dataclasses.replace(MODELS[name].config, **settings)
    torch.manual_seed(1)
    whole = build_theirs(config, config.depth)
    shorter = [build_theirs(config, i + 1) for i in range(config.depth)]
    state = dict(whole.state_dict())
    with torch.no_grad():
        for i, bert in enumerate(shorter):  # each with the layers of the whole, and a pooler and classifier of its own
            bert.bert.embeddings.load_state_dict(whole.bert.embeddings.state_dict())
            for mine, theirs in zip(bert.bert.encoder.layer, whole.bert.encoder.layer, strict=False):
                mine.load_state_dict(theirs.state_dict())
            bert.classifier.weight.mul_(0.1 + 4 * i)  # the first is unsure, the second not, so that each exit is taken
            if i == config.depth - 1:
                bert.load_state_dict(whole.state_dict())
            highway = f"bert.encoder.highway.{i}"
            for kind in ("weight", "bias"):
                state[f"{highway}.pooler.dense.{kind}"] = getattr(bert.bert.pooler.dense, kind).clone()
                state[f"{highway}.classifier.{kind}"] = getattr(bert.classifier, kind).clone()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "deebert.safetensors")
    ours = spec.build()
    assert load_weights(ours, tmp_path / "deebert.safetensors", spec.layouts).layout == "DeeBERT"
    taken = set()
    for threshold in (0.01, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0):
        ours.threshold = threshold
        for seed, sizes in ((0, {}), *((seed, {"batch": 1, "length": 11}) for seed in range(1, 6)), (6, {"batch": 3})):
            tokens = draw(spec, seed, **sizes)["tokens"]
            with torch.no_grad():
                logits, number = ours(tokens)
                assert_close(logits, shorter[number.item() - 1](tokens).logits)
            taken.add(number.item())
    assert taken == {1, 2, 3}
