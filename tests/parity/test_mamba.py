"""Our Mamba against transformers' MambaForCausalLM on equal weights."""

from __future__ import annotations

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights

from .compare import assert_close, draw

SETTINGS = [{}, {"hidden_size": 48, "depth": 3, "state_size": 16, "conv_size": 3, "expand": 1, "dt_rank": 7}]


def build_theirs(config):
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.depth,
            state_size=config.state_size,
            conv_kernel=config.conv_size,
            expand=config.expand,
            time_step_rank=config.rank,
            layer_norm_epsilon=config.norm_eps,
        )
    ).eval()


def zeros(inputs):
    return {key: value if key in ("tokens", "token") else torch.zeros_like(value) for key, value in inputs.items()}


@pytest.mark.parametrize("settings", SETTINGS)
def test_their_weights_in_ours(settings, tmp_path):
    entry = MODELS["mamba-tiny"]
    spec, config = entry.spec(settings), type(entry.config)(**{**vars(entry.config), **settings})
    torch.manual_seed(3)
    theirs = build_theirs(config)
    with torch.no_grad():  # their initialisation has embeddings of 0.1 and norms of 1
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    with torch.device("meta"):
        ours = spec.build()
    assert load_weights(ours, tmp_path / "model.safetensors", spec.layouts).layout == "transformers"
    for seed, length in [(0, 16), (1, 2), (2, 33)]:
        inputs = zeros(draw(spec, seed, batch=3, length=length))
        with torch.no_grad():
            assert_close(ours(**inputs)[0], theirs(inputs["tokens"]).logits)


def test_our_weights_in_theirs_and_their_stream():
    """Their generation continues from a prompt as our step continues from our prefill."""
    spec, step_spec = MODELS["mamba-tiny"].spec(), MODELS["mamba-step-tiny"].spec()
    ours, step = random_weights(spec, seed=5), step_spec.build()
    step.load_state_dict(ours.state_dict())
    theirs = build_theirs(MODELS["mamba-tiny"].config)
    state = {key.replace("embedding.", "embeddings."): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(state | {"lm_head.weight": state["backbone.embeddings.weight"]}, strict=True)
    inputs = zeros(draw(spec, 1, batch=2, length=11))
    with torch.no_grad():
        logits, *states = ours(**inputs)
        prompt = theirs(inputs["tokens"], use_cache=True)
        # Embeddings of 0.02 make small logits; what is compared has a spread of 1 or so.
        assert_close(5 * logits, 5 * prompt.logits)
        token = torch.tensor([3, 60])
        logits, *states = step(token, *states)
        theirs_next = theirs(token[:, None], cache_params=prompt.cache_params, use_cache=True)
    assert_close(5 * logits, 5 * theirs_next.logits[:, 0])
