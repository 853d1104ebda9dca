"""Our DiT against diffusers' DiTTransformer2DModel on equal weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DiTTransformer2DModel

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights

from .compare import assert_close, draw, fill_zeros

MODEL_SIZES = ["dit-tiny", "dit-s-2"]
EMBEDDERS = ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "class_embedder.embedding_table")


def build_theirs(config):
    return DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=config.mlp_norm_eps,
    )


def build_equal_copies(config, seed):
    """Theirs with random weights, where each block has the same embedders, as in converted checkpoints."""
    torch.manual_seed(seed)
    theirs = fill_zeros(build_theirs(config), seed)
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())
    return theirs


def run_theirs(theirs, inputs):
    with torch.no_grad():
        return theirs(inputs["x"], timestep=inputs["t"], class_labels=inputs["y"]).sample


def run_ours(ours, inputs):
    with torch.no_grad():
        return ours(**inputs)


def to_diffusers(state, depth):
    """Our state dict under their names, written independently of the model file."""
    theirs = {}
    for kind in ("weight", "bias"):
        theirs[f"pos_embed.proj.{kind}"] = state[f"x_embedder.proj.{kind}"]
        theirs[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        theirs[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
        for i in range(depth):
            ours, block = f"blocks.{i}", f"transformer_blocks.{i}"
            q, k, v = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            theirs |= {f"{block}.attn1.to_q.{kind}": q, f"{block}.attn1.to_k.{kind}": k, f"{block}.attn1.to_v.{kind}": v}
            theirs[f"{block}.attn1.to_out.0.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            theirs[f"{block}.ff.net.0.proj.{kind}"] = state[f"{ours}.mlp.fc1.{kind}"]
            theirs[f"{block}.ff.net.2.{kind}"] = state[f"{ours}.mlp.fc2.{kind}"]
            theirs[f"{block}.norm1.linear.{kind}"] = state[f"{ours}.adaLN_modulation.1.{kind}"]
            theirs[f"{block}.norm1.emb.timestep_embedder.linear_1.{kind}"] = state[f"t_embedder.mlp.0.{kind}"]
            theirs[f"{block}.norm1.emb.timestep_embedder.linear_2.{kind}"] = state[f"t_embedder.mlp.2.{kind}"]
    for i in range(depth):
        theirs[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
    return theirs


@pytest.mark.parametrize("mlp_norm_eps", [1e-6, 1e-5])
@pytest.mark.parametrize("name", MODEL_SIZES)
@pytest.mark.parametrize("shard", ["10GB", "40KB"])
def test_their_weights_in_ours(name, mlp_norm_eps, shard, tmp_path):
    if shard == "40KB" and name != "dit-tiny":
        shard = "30MB"
    spec = MODELS[name].spec({"frequency_shift": 1, "mlp_norm_eps": mlp_norm_eps})
    config = dataclasses.replace(MODELS[name].config, frequency_shift=1, mlp_norm_eps=mlp_norm_eps)
    theirs = build_equal_copies(config, seed=3)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    with torch.device("meta"):
        ours = spec.build()
    info = load_weights(ours, tmp_path, spec.layouts)
    assert (info.layout, info.dtypes) == ("diffusers", ("F32",))
    for seed, batch in [(0, 2), (1, 3)]:
        inputs = draw(spec, seed, batch=batch)
        assert_close(run_ours(ours, inputs), run_theirs(theirs, inputs))


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_our_weights_in_theirs(name):
    config = dataclasses.replace(MODELS[name].config, frequency_shift=1)
    spec = MODELS[name].spec({"frequency_shift": 1})
    ours = random_weights(spec, seed=5)
    theirs = build_theirs(config).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), config.depth), strict=True)
    for seed, batch in [(0, 2), (1, 3)]:
        inputs = draw(spec, seed, batch=batch)
        assert_close(run_ours(ours, inputs), run_theirs(theirs, inputs))


def test_the_authors_frequencies_are_not_theirs():
    """Also shows that the comparison sees a small deviation: 1 in 127 in the spacing of the timestep's frequencies."""
    config, spec = MODELS["dit-tiny"].config, MODELS["dit-tiny"].spec()
    ours = random_weights(spec, seed=5)
    theirs = build_theirs(config).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), config.depth), strict=True)
    inputs = draw(spec, 0)
    with pytest.raises(AssertionError):
        assert_close(run_ours(ours, inputs), run_theirs(theirs, inputs))


def test_copies_that_differ_are_refused(tmp_path):
    spec = MODELS["dit-tiny"].spec()
    torch.manual_seed(0)
    build_theirs(MODELS["dit-tiny"].config).save_pretrained(tmp_path)  # every block with embedders of its own
    with pytest.raises(WeightsError, match="copies of y_embedder") as caught:
        load_weights(spec.build(), tmp_path, spec.layouts)
    assert any("transformer_blocks.1" in reason.where for reason in caught.value.reasons)


def test_the_config_of_another_model_is_refused(tmp_path):
    config = dataclasses.replace(MODELS["dit-tiny"].config, num_heads=4)  # the same shapes, another model
    build_equal_copies(config, seed=0).save_pretrained(tmp_path)
    spec = MODELS["dit-tiny"].spec()
    with pytest.raises(WeightsError, match=r"config\.json") as caught:
        load_weights(spec.build(), tmp_path, spec.layouts)
    assert [reason.where for reason in caught.value.reasons] == ["num_attention_heads", "attention_head_dim"]
