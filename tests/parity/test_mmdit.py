"""Our MMDiT against diffusers' SD3Transformer2DModel on equal weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights

from .compare import assert_close, draw, fill_zeros

# The second is MMDiT-X: Stable Diffusion 3.5 Medium has normalised queries and keys, and a second attention in its first 13 layers.
SETTINGS = [{}, {"qk_norm": True, "dual_layers": 2, "depth": 4}]
INPUTS = [(0, {}), (1, {"batch": 3, "height": 16, "width": 6, "length": 7})]


def build_theirs(config):
    return SD3Transformer2DModel(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=config.hidden_size // config.num_heads,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_channels,
        caption_projection_dim=config.hidden_size,
        pooled_projection_dim=config.pooled_channels,
        pos_embed_max_size=config.pos_table,
        dual_attention_layers=tuple(range(config.dual_layers)),
        qk_norm="rms_norm" if config.qk_norm else None,
    )


def random_theirs(config, seed):
    """With norms' weights that are not all 1."""
    torch.manual_seed(seed)
    theirs = fill_zeros(build_theirs(config), seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".norm_" in name and parameter.ndim == 1:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return theirs


def compare(ours, theirs, spec):
    for seed, sizes in INPUTS:
        inputs = draw(spec, seed, **sizes)
        with torch.no_grad():
            expected = theirs(inputs["x"], inputs["context"], inputs["pooled"], inputs["t"]).sample
            assert_close(ours(**inputs), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_their_weights_in_ours(settings, tmp_path):
    spec, config = MODELS["mmdit-tiny"].spec(settings), dataclasses.replace(MODELS["mmdit-tiny"].config, **settings)
    theirs = random_theirs(config, seed=3)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB" if settings else "10GB")
    with torch.device("meta"):
        ours = spec.build()
    assert load_weights(ours, tmp_path, spec.layouts).layout == "diffusers"
    compare(ours, theirs, spec)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_the_published_layout(settings, prefix, tmp_path):
    """Our names are the authors', which diffusers' own converter reads; a checkpoint of the whole pipeline has other models beside it."""
    spec, config = MODELS["mmdit-tiny"].spec(settings), dataclasses.replace(MODELS["mmdit-tiny"].config, **settings)
    source = random_weights(spec, seed=5)
    published = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    theirs = build_theirs(config).eval()
    theirs.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(published)), strict=True)
    compare(source, theirs, spec)

    others = {"first_stage_model.encoder.conv_in.bias": torch.zeros(3)} if prefix else {}
    save_file(published | others, tmp_path / "sd3.safetensors")
    ours = spec.build()
    assert load_weights(ours, tmp_path / "sd3.safetensors", spec.layouts).layout == ("Stability-AI/sd3.5" if prefix else "isthmus")
    compare(ours, theirs, spec)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_table_of_positions(settings):
    spec, config = MODELS["mmdit-tiny"].spec(settings), dataclasses.replace(MODELS["mmdit-tiny"].config, **settings)
    theirs = build_theirs(config).pos_embed.pos_embed
    torch.testing.assert_close(spec.build().pos_embed, theirs, rtol=0, atol=1e-6)


def test_epsilons():
    """Too small to show in outputs of this scale; theirs are all the same."""
    spec, config = MODELS["mmdit-tiny"].spec(SETTINGS[1]), dataclasses.replace(MODELS["mmdit-tiny"].config, **SETTINGS[1])
    for model in (spec.build(), build_theirs(config)):
        epsilons = [module.eps for module in model.modules() if type(module).__name__ in ("LayerNorm", "RMSNorm")]
        assert len(epsilons) >= 4 * config.depth
        assert set(epsilons) == {1e-6}


@pytest.mark.parametrize("name", ["mmdit-sd3-medium", "mmdit-sd3.5-medium"])
def test_as_many_parameters(name):
    with torch.device("meta"):
        ours, theirs = MODELS[name].spec().build(), build_theirs(MODELS[name].config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_config_of_another_model_is_refused(tmp_path):
    config = dataclasses.replace(MODELS["mmdit-tiny"].config, num_heads=4)  # the same shapes, another model
    build_theirs(config).save_pretrained(tmp_path)
    spec = MODELS["mmdit-tiny"].spec()
    with pytest.raises(WeightsError, match=r"config\.json") as caught:
        load_weights(spec.build(), tmp_path, spec.layouts)
    assert [reason.where for reason in caught.value.reasons] == ["num_attention_heads", "attention_head_dim"]
