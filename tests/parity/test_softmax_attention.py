"""Our softmax attention against transformers' LlamaAttention on equal weights, over a sequence and step by step with its cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights

from .compare import assert_close, draw

SIZES = [{}, {"num_kv_heads": 1, "bias": True, "rope_base": 500000.0, "head_dim": 24}]


def build_both(settings):
    spec = MODELS["softmax-attention-tiny"].spec(settings)
    ours = random_weights(spec, seed=2)
    config = LlamaConfig(
        hidden_size=ours.config.hidden_size,
        num_attention_heads=ours.config.num_heads,
        num_key_value_heads=ours.config.num_kv_heads,
        head_dim=ours.config.head_dim,
        attention_bias=ours.config.bias,
        rope_parameters={"rope_type": "default", "rope_theta": ours.config.rope_base},
        attn_implementation="eager",
    )
    theirs = LlamaAttention(config, layer_idx=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return spec, ours, theirs, LlamaRotaryEmbedding(config)


def run_theirs(theirs, rotary, x, start=0, cache=None):
    positions = torch.arange(start, start + x.shape[1])[None]
    mask = torch.full((x.shape[1], start + x.shape[1]), -torch.inf).triu(start + 1)[None, None]
    with torch.no_grad():
        return theirs(x, position_embeddings=rotary(x, positions), attention_mask=mask, past_key_values=cache)[0]


@pytest.mark.parametrize("settings", SIZES)
def test_sequence(settings):
    spec, ours, theirs, rotary = build_both(settings)
    for seed, length in [(0, 7), (1, 50)]:
        x = 3 * draw(spec, seed, length=length)["x"]
        cache = DynamicCache()
        expected = run_theirs(theirs, rotary, x, cache=cache)
        y, keys, values = ours(x)
        assert_close(y, expected)
        assert_close(keys, cache.layers[0].keys)
        assert_close(values, cache.layers[0].values)


@pytest.mark.parametrize("settings", SIZES)
def test_steps(settings):
    spec, ours, theirs, rotary = build_both(settings)
    step = random_weights(MODELS["softmax-attention-step-tiny"].spec(settings), seed=9)
    step.load_state_dict(ours.state_dict())
    x = 3 * draw(spec, 3, length=30)["x"]
    cache = DynamicCache()
    run_theirs(theirs, rotary, x[:, :20], cache=cache)
    _, keys, values = ours(x[:, :20])
    for n in range(20, 30):
        y, keys, values = step(x[:, n], keys, values)
        assert_close(y, run_theirs(theirs, rotary, x[:, n : n + 1], n, cache)[:, 0])
