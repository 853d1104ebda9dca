"""Our SANA transformer against diffusers' SanaTransformer2DModel on equal weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import SanaTransformer2DModel

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights

from .compare import assert_close, draw, fill_zeros

# The second has every width of the published 0.6 B model, and 3 of its 28 blocks.
MODEL_SIZES = [
    ("sana-tiny", {}),
    ("sana-600m", {"depth": 3}),
    ("sana-tiny", {"patch_size": 2}),
    ("sana-tiny", {"patch_size": 2, "position_scale": 2.0}),
]
INPUTS = [(0, {}), (1, {"batch": 3, "height": 12, "width": 10, "length": 7})]


def build_theirs(config):
    return SanaTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_attention_heads=config.hidden_size // config.head_dim,
        attention_head_dim=config.head_dim,
        num_layers=config.depth,
        num_cross_attention_heads=config.num_cross_heads,
        cross_attention_head_dim=config.hidden_size // config.num_cross_heads,
        cross_attention_dim=config.hidden_size,
        caption_channels=config.caption_channels,
        mlp_ratio=config.mlp_ratio,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        interpolation_scale=config.position_scale or None,
    )


def run_theirs(theirs, inputs, *, mask):
    with torch.no_grad():
        return theirs(
            inputs["x"],
            encoder_hidden_states=inputs["caption"],
            timestep=inputs["t"],
            encoder_attention_mask=inputs["mask"] if mask else None,
        ).sample


def run_ours(ours, inputs, *, mask):
    with torch.no_grad():
        return ours(inputs["x"], inputs["t"], inputs["caption"], inputs["mask"] if mask else None)


def to_diffusers(state, depth):
    """Our state dict under their names, written independently of the model file."""
    theirs = {"scale_shift_table": state["final_layer.scale_shift_table"], "caption_norm.weight": state["attention_y_norm.weight"]}
    for kind in ("weight", "bias"):
        theirs[f"patch_embed.proj.{kind}"] = state[f"x_embedder.proj.{kind}"]
        theirs[f"time_embed.emb.timestep_embedder.linear_1.{kind}"] = state[f"t_embedder.mlp.0.{kind}"]
        theirs[f"time_embed.emb.timestep_embedder.linear_2.{kind}"] = state[f"t_embedder.mlp.2.{kind}"]
        theirs[f"time_embed.linear.{kind}"] = state[f"t_block.1.{kind}"]
        theirs[f"caption_projection.linear_1.{kind}"] = state[f"y_embedder.0.{kind}"]
        theirs[f"caption_projection.linear_2.{kind}"] = state[f"y_embedder.2.{kind}"]
        theirs[f"proj_out.{kind}"] = state[f"final_layer.linear.{kind}"]
        for i in range(depth):
            ours, block = f"blocks.{i}", f"transformer_blocks.{i}"
            theirs[f"{block}.attn1.to_out.0.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            theirs[f"{block}.attn2.to_q.{kind}"] = state[f"{ours}.cross_attn.q_linear.{kind}"]
            k, v = state[f"{ours}.cross_attn.kv_linear.{kind}"].chunk(2)
            theirs |= {f"{block}.attn2.to_k.{kind}": k, f"{block}.attn2.to_v.{kind}": v}
            theirs[f"{block}.attn2.to_out.0.{kind}"] = state[f"{ours}.cross_attn.proj.{kind}"]
            theirs[f"{block}.ff.conv_inverted.{kind}"] = state[f"{ours}.mlp.inverted_conv.{kind}"]
            theirs[f"{block}.ff.conv_depth.{kind}"] = state[f"{ours}.mlp.depth_conv.{kind}"]
    for i in range(depth):
        ours, block = f"blocks.{i}", f"transformer_blocks.{i}"
        q, k, v = state[f"{ours}.attn.qkv.weight"].chunk(3)
        theirs |= {f"{block}.attn1.to_q.weight": q, f"{block}.attn1.to_k.weight": k, f"{block}.attn1.to_v.weight": v}
        theirs[f"{block}.ff.conv_point.weight"] = state[f"{ours}.mlp.point_conv.weight"]
        theirs[f"{block}.scale_shift_table"] = state[f"{ours}.scale_shift_table"]
    return theirs


@pytest.mark.parametrize("shard", ["10GB", "60KB"])
@pytest.mark.parametrize(("name", "settings"), MODEL_SIZES)
def test_their_weights_in_ours(name, settings, shard, tmp_path):
    if shard == "60KB" and name != "sana-tiny":
        shard = "200MB"
    spec, config = MODELS[name].spec(settings), dataclasses.replace(MODELS[name].config, **settings)
    torch.manual_seed(3)
    theirs = fill_zeros(build_theirs(config), seed=3)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    with torch.device("meta"):
        ours = spec.build()
    info = load_weights(ours, tmp_path, spec.layouts)
    assert (info.layout, info.dtypes) == ("diffusers", ("F32",))
    for seed, sizes in INPUTS:
        inputs = draw(spec, seed, **sizes)
        for mask in (True, False):
            assert_close(run_ours(ours, inputs, mask=mask), run_theirs(theirs, inputs, mask=mask))


@pytest.mark.parametrize(("name", "settings"), MODEL_SIZES)
def test_our_weights_in_theirs(name, settings):
    spec, config = MODELS[name].spec(settings), dataclasses.replace(MODELS[name].config, **settings)
    ours = random_weights(spec, seed=5)
    theirs = build_theirs(config).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), config.depth), strict=True)
    for seed, sizes in INPUTS:
        inputs = draw(spec, seed, **sizes)
        for mask in (True, False):
            assert_close(run_ours(ours, inputs, mask=mask), run_theirs(theirs, inputs, mask=mask))


@pytest.mark.parametrize("name", ["sana-600m", "sana-1.6b"])
def test_as_many_parameters(name):
    with torch.device("meta"):
        ours, theirs = MODELS[name].spec().build(), build_theirs(MODELS[name].config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_half_precision_file(tmp_path):
    spec = MODELS["sana-tiny"].spec()
    torch.manual_seed(1)
    theirs = fill_zeros(build_theirs(MODELS["sana-tiny"].config), seed=1).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, variant="bf16")
    ours = spec.build()
    assert load_weights(ours, tmp_path, spec.layouts).dtypes == ("BF16",)
    inputs = draw(spec, 0)
    assert_close(run_ours(ours, inputs, mask=True), run_theirs(theirs.float(), inputs, mask=True))


def test_the_config_of_another_model_is_refused(tmp_path):
    config = dataclasses.replace(MODELS["sana-tiny"].config, num_cross_heads=4)  # the same shapes, another model
    build_theirs(config).save_pretrained(tmp_path)
    spec = MODELS["sana-tiny"].spec()
    with pytest.raises(WeightsError, match=r"config\.json") as caught:
        load_weights(spec.build(), tmp_path, spec.layouts)
    assert [reason.where for reason in caught.value.reasons] == ["num_cross_attention_heads", "cross_attention_head_dim"]
