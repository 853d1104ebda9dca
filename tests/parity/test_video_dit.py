"""Our video DiT against diffusers' WanTransformer3DModel on equal weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights

from .compare import assert_close, draw, fill_zeros


def build_theirs(config):
    return WanTransformer3DModel(
        patch_size=(config.patch_frames, config.patch_size, config.patch_size),
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.depth,
        rope_max_seq_len=config.max_positions,
    )


@pytest.mark.parametrize("settings", [{}, {"hidden_size": 64, "num_heads": 4, "depth": 1}])
def test_their_weights_in_ours(settings, tmp_path):
    spec = MODELS["video-dit-tiny"].spec(settings)
    with torch.device("meta"):
        ours = spec.build()
    torch.manual_seed(3)
    theirs = fill_zeros(build_theirs(ours.config), 3)
    theirs.save_pretrained(tmp_path)
    assert load_weights(ours, tmp_path, spec.layouts).layout == "diffusers"
    for seed, sizes in [(0, {}), (1, {"batch": 1, "frames": 5, "height": 6, "width": 4, "text": 7})]:
        inputs = draw(spec, seed, **sizes)
        with torch.no_grad():
            reference = theirs(inputs["x"], inputs["t"], inputs["context"]).sample
            got = ours(**inputs)
        assert_close(got, reference)


@pytest.mark.parametrize("name", ["video-dit-wan-1.3b", "video-dit-wan-14b"])
def test_the_published_sizes_have_the_same_parameters(name):
    with torch.device("meta"):
        ours = MODELS[name].spec().build()
        theirs = build_theirs(ours.config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
