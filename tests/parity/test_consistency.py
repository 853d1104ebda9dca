"""Our consistency model against diffusers' UNet2DModel and scheduler on equal weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, UNet2DModel

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights

from .compare import assert_close, draw, fill_zeros


def build_theirs(config):
    return UNet2DModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=["AttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in config.attention],
        up_block_types=["AttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in reversed(config.attention)],
        block_out_channels=config.widths,
        layers_per_block=config.layers,
        attention_head_dim=config.head_dim,
        norm_num_groups=config.norm_groups,
        attn_norm_num_groups=config.norm_groups,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=config.num_classes,
    )


def origin(theirs, x, sigma, y):
    """One step of diffusers' pipeline, row by row, without its clamp."""
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    rows = []
    for i in range(len(x)):
        skip, out = scheduler.get_scalings_for_boundary_condition(sigma[i].double())
        t = torch.from_numpy(scheduler.sigma_to_t(sigma[i].double().numpy()).reshape(1)).float()
        scaled = x[i : i + 1] / (sigma[i] ** 2 + scheduler.config.sigma_data**2) ** 0.5
        rows.append(skip.float() * x[i : i + 1] + out.float() * theirs(scaled, t, y[i : i + 1]).sample)
    return torch.cat(rows)


@pytest.mark.parametrize("settings", [{}, {"widths": (16, 16, 32), "attention": (False, True, True), "layers": 2, "sample_size": 16}])
def test_their_weights_in_ours(settings, tmp_path):
    spec = MODELS["consistency-tiny"].spec(settings)
    with torch.device("meta"):
        ours = spec.build()
    torch.manual_seed(3)
    theirs = fill_zeros(build_theirs(ours.config), 3)
    theirs.save_pretrained(tmp_path)
    assert load_weights(ours, tmp_path, spec.layouts).layout == "diffusers"
    for seed, batch in [(0, 2), (1, 3)]:
        inputs = draw(spec, seed, batch=batch)
        with torch.no_grad():
            assert_close(ours(**inputs), origin(theirs, inputs["x"], inputs["sigma"], inputs["y"]))


def test_the_released_configuration_has_as_many_parameters():
    spec = MODELS["consistency-imagenet64"].spec()
    with torch.device("meta"):
        ours = spec.build()
        theirs = build_theirs(ours.config)
    count = sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in ours.parameters()) == count
    assert round(count / 1e6) == 296


def test_a_different_epsilon_is_seen():
    spec = MODELS["consistency-tiny"].spec()
    ours = random_weights(spec, seed=5)
    theirs = build_theirs(ours.config).eval()
    theirs.load_state_dict(ours.unet.state_dict(), strict=True)
    theirs.conv_norm_out.eps = 1e-2
    inputs = draw(spec, 0)
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_close(ours(**inputs), origin(theirs, inputs["x"], inputs["sigma"], inputs["y"]))
