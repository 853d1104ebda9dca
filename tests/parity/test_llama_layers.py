"""Our RMSNorm and SwiGLU against Llama's in transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights

from .compare import assert_close, draw


def theirs(name, config):
    if name == "rmsnorm":
        return LlamaRMSNorm(config.dim, eps=config.eps)
    return LlamaMLP(LlamaConfig(hidden_size=config.dim, intermediate_size=config.hidden_dim, num_attention_heads=1, hidden_act="silu"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rmsnorm-tiny", {}),
        ("rmsnorm-tiny", {"dim": 48, "eps": 1e-2}),
        ("rmsnorm-4096", {}),
        ("swiglu-tiny", {}),
        ("swiglu-tiny", {"dim": 24, "hidden_dim": 40}),
    ],
)
def test_equal_weights_equal_outputs(name, settings):
    spec = MODELS[name].spec(settings)
    ours = random_weights(spec, seed=3)
    other = theirs(name.split("-", maxsplit=1)[0], type(MODELS[name].config)(**{**vars(MODELS[name].config), **settings}))
    other.load_state_dict(ours.state_dict(), strict=True)  # the names are the same
    for seed, sizes in ((0, {}), (1, {"batch": 1, "length": 11})):
        inputs = draw(spec, seed, **sizes)
        with torch.no_grad():
            assert_close(ours(**inputs), other.eval()(inputs["x"]))
