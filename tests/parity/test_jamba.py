"""Our Jamba against transformers' JambaForCausalLM on equal weights, prefill and step."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import JambaConfig as TheirConfig
from transformers import JambaForCausalLM

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights

from .compare import assert_close, draw, fill_zeros

SETTINGS = [{}, {"depth": 5, "attn_period": 4, "attn_offset": 2, "num_experts": 6, "top_k": 3, "num_kv_heads": 4, "mlp_size": 40}]


def build_theirs(config):
    torch.manual_seed(3)
    theirs = JambaForCausalLM(
        TheirConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            attn_layer_period=config.attn_period,
            attn_layer_offset=config.attn_offset,
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            expert_layer_period=config.expert_period,
            expert_layer_offset=config.expert_offset,
            mamba_d_state=config.state_size,
            mamba_d_conv=config.conv_size,
            mamba_expand=config.expand,
            mamba_dt_rank=config.dt_rank,
            initializer_range=0.2,
        )
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "layernorm" in name:
                parameter.uniform_(0.5, 1.5)
    return fill_zeros(theirs, 3).eval()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("stored", ["as they write it", "as they hold it"])
def test_their_weights_in_ours(settings, stored, tmp_path):
    spec, step_spec = MODELS["jamba-tiny"].spec(settings), MODELS["jamba-step-tiny"].spec(settings)
    config = type(MODELS["jamba-tiny"].config)(**{**vars(MODELS["jamba-tiny"].config), **settings})
    theirs = build_theirs(config)
    if stored == "as they write it":
        theirs.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    else:
        path = tmp_path / "memory.safetensors"
        save_file(theirs.state_dict(), path)
    ours, step = spec.build(), step_spec.build()
    for module, layouts in ((ours, spec.layouts), (step, step_spec.layouts)):
        assert load_weights(module, path, layouts).layout == "transformers"
    for seed, sizes in ((0, {}), (1, {"batch": 1, "length": 12})):
        tokens = draw(spec, seed, **sizes)["tokens"]
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
            assert_close(ours(tokens)[0], expected)
            _, *states = ours(tokens[:, :2])
            for t in range(2, tokens.shape[1]):
                logits, *states = step(tokens[:, t], *states)
                assert_close(logits, expected[:, t])


def test_a_missing_expert_is_refused(tmp_path):
    config = MODELS["jamba-tiny"].config
    theirs = build_theirs(config)
    theirs.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "model.safetensors")
    gone = [key for key in state if ".experts.3." in key]
    assert len(gone) == 3
    save_file({key: value for key, value in state.items() if key not in gone}, tmp_path / "less.safetensors")
    spec = MODELS["jamba-tiny"].spec()
    with pytest.raises(WeightsError):
        load_weights(spec.build(), tmp_path / "less.safetensors", spec.layouts)
