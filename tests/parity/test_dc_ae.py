"""Our DC-AE against diffusers' AutoencoderDC on equal weights."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers
from safetensors.torch import save_file

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights

from .compare import assert_close, draw, fill_zeros

# The second has widths that are kept, doubled and quadrupled, two further branches of attention, and stages of several depths.
SETTINGS = [
    {},
    {
        "widths": (4, 16, 16, 32),
        "sample_size": 16,
        "encoder_depths": (2, 1, 1, 2),
        "decoder_depths": (1, 2, 1, 3),
        "attention_stages": 2,
        "scales": (3, 5),
    },
]
HALVES = ["encode", "decode"]


def build_theirs(config):
    stages = len(config.widths)
    kinds = ["ResBlock"] * (stages - config.attention_stages) + ["EfficientViTBlock"] * config.attention_stages
    scales = [()] * (stages - config.attention_stages) + [config.scales] * config.attention_stages
    return AutoencoderDC(
        in_channels=config.in_channels,
        latent_channels=config.latent_channels,
        attention_head_dim=config.head_dim,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=config.widths,
        decoder_block_out_channels=config.widths,
        encoder_layers_per_block=config.encoder_depths,
        decoder_layers_per_block=config.decoder_depths,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
    )


def random_theirs(config, seed):
    torch.manual_seed(seed)
    return fill_zeros(build_theirs(config), seed)


def run(module, half, inputs):
    with torch.no_grad():
        if not isinstance(module, AutoencoderDC):
            return module(**inputs)
        return module.encode(inputs["x"]).latent if half == "encode" else module.decode(inputs["z"]).sample


def compare(ours, theirs, spec, config, half):
    """At the example's size, at one of another shape, and at one where they take the table of scores for so few positions."""
    unit = config.factor if half == "encode" else 1
    for seed, (batch, height, width) in enumerate([(2, 4, 4), (3, 7, 3), (1, 2, 3)]):
        inputs = draw(spec, seed, batch=batch, height=height * unit, width=width * unit)
        assert_close(run(ours, half, inputs), run(theirs, half, inputs))


def to_authors(state):
    """diffusers' state dict under the authors' names, written independently of the model file."""
    authors = {}
    for key, value in state.items():
        if key.endswith(".attn.to_q.weight"):
            q, k, v = (state[key.replace(".to_q.", f".to_{x}.")] for x in "qkv")
            authors[_authors_name(key).replace(".attn.to_q.", ".context_module.main.qkv.conv.")] = torch.cat([q, k, v])[:, :, None, None]
        elif key.endswith(".attn.to_out.weight"):
            name = _authors_name(key).replace(".attn.to_out.", ".context_module.main.proj.conv.")
            authors[name] = value[:, :, None, None].contiguous()
        elif not key.endswith((".attn.to_k.weight", ".attn.to_v.weight")):
            authors[_authors_name(key)] = value
    return authors


def _authors_name(key):
    name = re.sub(r"\.(down|up)_blocks\.(\d+)\.(\d+)\.", r".stages.\2.op_list.\3.", key)
    name = re.sub(r"(op_list\.\d+)\.(conv1|conv2)\.", r"\1.main.\2.conv.", name)
    name = re.sub(r"(op_list\.\d+)\.norm\.", r"\1.main.conv2.norm.", name)
    name = re.sub(r"(op_list\.\d+)\.conv\.", r"\1.main.conv.conv.", name)
    name = re.sub(r"\.attn\.to_qkv_multiscale\.(\d+)\.proj_in", r".context_module.main.aggreg.\1.0", name)
    name = re.sub(r"\.attn\.to_qkv_multiscale\.(\d+)\.proj_out", r".context_module.main.aggreg.\1.1", name)
    name = name.replace(".attn.norm_out.", ".context_module.main.proj.norm.")
    name = name.replace("conv_out.norm.", "local_module.main.point_conv.norm.")
    name = re.sub(r"conv_out\.conv_(inverted|depth|point)\.", r"local_module.main.\1_conv.conv.", name)
    name = name.replace(".conv_in.", ".project_in.conv.")
    name = name.replace("encoder.conv_out.", "encoder.project_out.op_list.0.conv.")
    name = name.replace("decoder.norm_out.", "decoder.project_out.op_list.0.")
    return name.replace("decoder.conv_out.", "decoder.project_out.op_list.2.conv.")


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("half", HALVES)
def test_their_weights_in_ours(half, settings, tmp_path):
    """One checkpoint holds both halves: each form takes its own and calls the other one neither missing nor unexpected."""
    entry = MODELS[f"dc-ae-{half}-tiny"]
    config = dataclasses.replace(entry.config, **settings)
    theirs = random_theirs(config, seed=3)
    theirs.save_pretrained(tmp_path, max_shard_size="10GB" if settings else "20KB")
    spec = entry.spec(settings)
    with torch.device("meta"):
        ours = spec.build()
    assert load_weights(ours, tmp_path, spec.layouts).layout == "diffusers"
    compare(ours, theirs, spec, config, half)


@pytest.mark.parametrize("half", HALVES)
def test_the_authors_layout(half, tmp_path):
    """diffusers' own converter reads what `to_authors` writes, and so do we."""
    entry = MODELS[f"dc-ae-{half}-tiny"]
    theirs = random_theirs(entry.config, seed=4)
    authors = to_authors(theirs.state_dict())
    back = convert_autoencoder_dc_checkpoint_to_diffusers(dict(authors))
    theirs.load_state_dict(back, strict=True)
    save_file(authors, tmp_path / "model.safetensors")
    spec = entry.spec()
    ours = spec.build()
    assert load_weights(ours, tmp_path / "model.safetensors", spec.layouts).layout == "mit-han-lab/efficientvit"
    compare(ours, theirs, spec, entry.config, half)


@pytest.mark.parametrize("half", HALVES)
def test_both_halves_of_ours(half, tmp_path):
    specs = {half: MODELS[f"dc-ae-{half}-tiny"].spec() for half in HALVES}
    modules = {half: random_weights(spec, seed=5) for half, spec in specs.items()}
    save_file(modules["encode"].state_dict() | modules["decode"].state_dict(), tmp_path / "both.safetensors")
    ours = specs[half].build()
    load_weights(ours, tmp_path / "both.safetensors", specs[half].layouts)
    assert all(torch.equal(value, modules[half].state_dict()[name]) for name, value in ours.state_dict().items())


def test_what_belongs_to_neither_half_is_reported(tmp_path):
    state = random_theirs(MODELS["dc-ae-encode-tiny"].config, seed=0).state_dict()
    save_file(state | {"quant_conv.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    spec = MODELS["dc-ae-encode-tiny"].spec()
    with pytest.raises(WeightsError, match="1 unexpected") as caught:
        load_weights(spec.build(), tmp_path / "more.safetensors", spec.layouts)
    assert [reason.where for reason in caught.value.reasons] == ["quant_conv.weight"]


@pytest.mark.parametrize("half", HALVES)
def test_as_many_parameters(half):
    entry = MODELS[f"dc-ae-{half}-f32c32-sana"]
    with torch.device("meta"):
        ours, theirs = entry.spec().build(), build_theirs(entry.config)
    half_of_theirs = theirs.encoder if half == "encode" else theirs.decoder
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in half_of_theirs.parameters())


def test_the_config_of_another_model_is_refused(tmp_path):
    config = dataclasses.replace(MODELS["dc-ae-decode-tiny"].config, decoder_depths=(1, 1, 2))
    build_theirs(config).save_pretrained(tmp_path)
    spec = MODELS["dc-ae-decode-tiny"].spec()
    with pytest.raises(WeightsError, match=r"config\.json") as caught:
        load_weights(spec.build(), tmp_path, spec.layouts)
    assert [reason.where for reason in caught.value.reasons] == ["decoder_layers_per_block"]
    spec = MODELS["dc-ae-encode-tiny"].spec()  # whose half is as asked for
    load_weights(spec.build(), tmp_path, spec.layouts)
