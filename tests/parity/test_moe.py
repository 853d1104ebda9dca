"""Our mixture of experts against those of Mixtral, DBRX and Jamba in transformers, and their checkpoints."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DbrxConfig, JambaConfig, MixtralConfig, MixtralModel
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights

from .compare import assert_close, draw

SIZES = [(0, {}), (1, {"batch": 1, "length": 33})]


def mixtral_config(config):
    return MixtralConfig(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        vocab_size=11,
    )


def build_theirs(kind, config):
    if kind == "mixtral":
        block = MixtralSparseMoeBlock(mixtral_config(config))
    elif kind == "jamba":
        block = JambaSparseMoeBlock(
            JambaConfig(
                hidden_size=config.dim,
                intermediate_size=config.hidden_dim,
                num_experts=config.num_experts,
                num_experts_per_tok=config.top_k,
            )
        )
    else:
        settings = {"ffn_hidden_size": config.hidden_dim, "moe_num_experts": config.num_experts, "moe_top_k": config.top_k}
        block = DbrxFFN(DbrxConfig(d_model=config.dim, ffn_config={"hidden_size": config.dim, **settings}))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return block.eval()


def compare(ours, theirs, spec, step=False):
    for seed, sizes in SIZES:
        x = draw(spec, seed, **{key: value for key, value in sizes.items() if key in spec.sizes})["x"]
        with torch.no_grad():
            expected = theirs(x[:, None] if step else x)
            assert_close(ours(x), expected[:, 0] if step else expected)


@pytest.mark.parametrize("name", ["moe-tiny", "moe-step-tiny"])
@pytest.mark.parametrize(
    ("kind", "settings"), [("mixtral", {}), ("mixtral", {"num_experts": 5, "top_k": 3, "hidden_dim": 16}), ("dbrx", {})]
)
def test_their_weights_in_ours(name, kind, settings, tmp_path):
    if kind == "dbrx":
        settings = dict(vars(MODELS["moe-dbrx-tiny"].config))
    spec = MODELS[name].spec(settings)
    theirs = build_theirs(kind, type(MODELS[name].config)(**{**vars(MODELS[name].config), **settings}))
    save_file(theirs.state_dict(), tmp_path / "block.safetensors")
    ours = spec.build()
    info = load_weights(ours, tmp_path / "block.safetensors", spec.layouts)
    assert info.layout == {"mixtral": "transformers", "dbrx": "databricks/dbrx"}[kind]
    compare(ours, theirs, spec, step=name == "moe-step-tiny")


def test_jamba_s_weights_are_not_divided_by_their_sum():
    settings = {"num_experts": 16, "normalize": False}
    spec = MODELS["moe-tiny"].spec(settings)
    theirs = build_theirs("jamba", type(MODELS["moe-tiny"].config)(**{**vars(MODELS["moe-tiny"].config), **settings}))
    state = theirs.state_dict()
    weights = {"gate.weight": state["router.weight"], "gate_up_proj": state["experts.gate_up_proj"]}
    weights["down_proj"] = state["experts.down_proj"].mT
    ours = random_weights(spec, seed=0)
    ours.load_state_dict(weights, strict=True)
    compare(ours, theirs, spec)
    ours.gate.normalize = True
    with pytest.raises(AssertionError):
        compare(ours, theirs, spec)


def test_a_layer_of_a_checkpoint_that_they_write(tmp_path):
    """They write experts one by one, as in Mixtral's files, and hold them stacked."""
    spec, config = MODELS["moe-tiny"].spec(), MODELS["moe-tiny"].config
    torch.manual_seed(0)
    model = MixtralModel(mixtral_config(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    model.save_pretrained(tmp_path / "model")
    written = load_file(tmp_path / "model" / "model.safetensors")
    layer = {key: value for key, value in written.items() if "layers.1.block_sparse_moe." in key}
    assert len(layer) == 1 + 3 * config.num_experts
    save_file(layer, tmp_path / "layer.safetensors")
    ours = spec.build()
    assert load_weights(ours, tmp_path / "layer.safetensors", spec.layouts).layout == "mistralai/Mixtral"
    compare(ours, model.layers[1].mlp, spec)
