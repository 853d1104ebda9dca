"""The blocks of our Vision Mamba against mambapy's VMamba on equal weights."""

from __future__ import annotations

import pytest
import torch
from mambapy.vim import MambaConfig, VMamba

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights

from .compare import assert_close


def build_theirs(config):
    return VMamba(
        MambaConfig(
            d_model=config.hidden_size,
            n_layers=config.depth,
            d_state=config.state_size,
            expand_factor=config.expand,
            d_conv=config.conv_size,
            rms_norm_eps=config.norm_eps,
        )
    ).eval()


def to_theirs(state):
    theirs = {}
    for key, value in state.items():
        name = key.replace(".forwards", "")
        if ".backwards." in name:
            name = name.replace(".backwards", "").replace("conv1d", "conv1d_b").replace("_proj", "_proj_b")
            name = f"{name}_b" if name.endswith((".D", ".A_log")) else name
        theirs[f"layers.{name}"] = value
    return theirs


@pytest.mark.parametrize("settings", [{}, {"hidden_size": 48, "depth": 3, "state_size": 16, "conv_size": 3}])
def test_our_weights_in_theirs(settings):
    entry = MODELS["vim-tiny"]
    ours = random_weights(entry.spec(settings), seed=3)
    theirs = build_theirs(type(entry.config)(**{**vars(entry.config), **settings}))
    theirs.load_state_dict(to_theirs(ours.layers.state_dict()), strict=True)
    for seed, length in ((0, 17), (1, 40)):
        x = torch.randn(2, length, theirs.config.d_model, generator=torch.Generator().manual_seed(seed))
        h = x
        with torch.no_grad():
            for layer in ours.layers:
                h = layer(h)
            assert_close(h - x, theirs(x) - x)
