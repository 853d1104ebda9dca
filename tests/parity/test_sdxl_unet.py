"""Our SDXL U-Net against diffusers' UNet2DConditionModel on equal weights."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights

from .compare import assert_close, draw, fill_zeros

# The second has SDXL's three resolutions and two residual blocks at each.
SETTINGS = [{}, {"widths": (16, 32, 64), "layers": 2, "attention_depths": (0, 1, 2)}]
INPUTS = [(0, {}), (1, {"batch": 3, "height": 12, "width": 8, "length": 7}), (2, {"batch": 1, "height": 7, "width": 10, "length": 30})]


def build_theirs(config):
    kinds = ["CrossAttn" if depth else "" for depth in config.attention_depths]
    return UNet2DConditionModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        block_out_channels=config.widths,
        layers_per_block=config.layers,
        transformer_layers_per_block=[max(1, depth) for depth in config.attention_depths],
        attention_head_dim=[width // config.head_dim for width in config.widths],
        cross_attention_dim=config.context_channels,
        addition_embed_type="text_time",
        addition_time_embed_dim=config.condition_channels,
        projection_class_embeddings_input_dim=config.pooled_channels + 6 * config.condition_channels,
        use_linear_projection=True,
        norm_num_groups=config.norm_groups,
    )


def random_theirs(config, seed):
    torch.manual_seed(seed)
    return fill_zeros(build_theirs(config), seed)


def compare(ours, theirs, spec):
    """The last size is none that halves exactly."""
    for seed, sizes in INPUTS:
        inputs = draw(spec, seed, **sizes)
        added = {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]}
        with torch.no_grad():
            expected = theirs(inputs["x"], inputs["t"], inputs["context"], added_cond_kwargs=added).sample
            assert_close(ours(**inputs), expected)


def to_authors(state, config):
    """diffusers' state dict under the authors' names, written independently of the model file."""
    parts = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for level, depth in enumerate(config.attention_depths):
        first = level * (config.layers + 1)
        for i in range(config.layers):
            names[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{first + i + 1}.0"
            names[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{first + i + 1}.1"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + config.layers + 1}.0.op"
        from_below = len(config.widths) - 1 - level
        first = from_below * (config.layers + 1)
        for i in range(config.layers + 1):
            names[f"up_blocks.{from_below}.resnets.{i}"] = f"output_blocks.{first + i}.0"
            names[f"up_blocks.{from_below}.attentions.{i}"] = f"output_blocks.{first + i}.1"
        names[f"up_blocks.{from_below}.upsamplers.0.conv"] = f"output_blocks.{first + config.layers}.{2 if depth else 1}.conv"
    names |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    authors = {}
    for key, value in state.items():
        module = max((name for name in names if key.startswith(f"{name}.")), key=len)
        rest = key.removeprefix(f"{module}.")
        if ".resnets." in module:
            rest = re.sub(r"^\w+", lambda match: parts[match[0]], rest)
        authors[f"model.diffusion_model.{names[module]}.{rest}"] = value
    return authors


@pytest.mark.parametrize("settings", SETTINGS)
def test_their_weights_in_ours(settings, tmp_path):
    spec, config = MODELS["sdxl-unet-tiny"].spec(settings), dataclasses.replace(MODELS["sdxl-unet-tiny"].config, **settings)
    theirs = random_theirs(config, seed=3)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    with torch.device("meta"):
        ours = spec.build()
    assert load_weights(ours, tmp_path, spec.layouts).layout == "diffusers"
    compare(ours, theirs, spec)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_authors_layout(settings, tmp_path):
    """diffusers' own converter reads what `to_authors` writes, and so do we."""
    spec, config = MODELS["sdxl-unet-tiny"].spec(settings), dataclasses.replace(MODELS["sdxl-unet-tiny"].config, **settings)
    theirs = random_theirs(config, seed=4)
    authors = to_authors(theirs.state_dict(), config)
    back = convert_ldm_unet_checkpoint(dict(authors), {"addition_embed_type": "text_time", "layers_per_block": config.layers})
    theirs.load_state_dict(back, strict=True)
    save_file(authors | {"first_stage_model.decoder.conv_in.bias": torch.zeros(3)}, tmp_path / "sd_xl.safetensors")
    ours = spec.build()
    assert load_weights(ours, tmp_path / "sd_xl.safetensors", spec.layouts).layout == "Stability-AI/generative-models"
    compare(ours, theirs, spec)


def test_epsilons():
    """Too small to show in outputs of this scale."""
    ours, theirs = MODELS["sdxl-unet-tiny"].spec().build(), build_theirs(MODELS["sdxl-unet-tiny"].config)
    norms = {name: module.eps for name, module in theirs.named_modules() if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm)}
    assert len(norms) == 33
    assert norms == {name: ours.get_submodule(name).eps for name in norms}


def test_as_many_parameters():
    with torch.device("meta"):
        ours, theirs = MODELS["sdxl-unet-base"].spec().build(), build_theirs(MODELS["sdxl-unet-base"].config)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }


def test_the_config_of_another_model_is_refused(tmp_path):
    config = dataclasses.replace(MODELS["sdxl-unet-tiny"].config, head_dim=8)  # the same shapes, another model
    build_theirs(config).save_pretrained(tmp_path)
    spec = MODELS["sdxl-unet-tiny"].spec()
    with pytest.raises(WeightsError, match=r"config\.json") as caught:
        load_weights(spec.build(), tmp_path, spec.layouts)
    assert [reason.where for reason in caught.value.reasons] == ["attention_head_dim"]
