"""What of the video DiT diffusers cannot check; the network itself is compared with it in `tests/parity/test_video_dit.py`."""

import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.video_dit import VideoDiTConfig

TINY = MODELS["video-dit-tiny"]


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("deep", [1, 2])
def test_patches_are_those_of_a_convolution_over_space_and_time(deep):
    """The embedding is written as one over pictures."""
    spec = TINY.spec({"patch_frames": deep})
    module = random_weights(spec, seed=0)
    inputs = spec.inputs(rng(), spec.sizes)
    seen = []
    module.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        out = module(**inputs)
        expected = module.patch_embedding(inputs["x"]).flatten(2).transpose(1, 2)
    assert out.shape == inputs["x"].shape
    assert torch.allclose(seen[0], expected, atol=1e-5)


@pytest.mark.parametrize("deep", [1, 2])
def test_every_patch_comes_out_where_it_went_in(deep):
    """A network whose blocks and norms do nothing is a linear map of each patch, which is made the identity here."""
    spec = TINY.spec({"patch_frames": deep, "in_channels": 4 if deep == 1 else 2, "hidden_size": 48})
    module = random_weights(spec, seed=0)
    module.blocks = torch.nn.ModuleList()
    size = module.config.in_channels * deep * 4
    with torch.no_grad():
        module.patch_embedding.weight.zero_()
        module.patch_embedding.bias.zero_()
        module.head.norm = torch.nn.Identity()
        module.head.modulation.zero_()
        module.time_embedding[2].weight.zero_()
        module.time_embedding[2].bias.zero_()
        module.head.head.weight.zero_()
        module.head.head.bias.zero_()
        # Output n of a patch is (frame, row, column, channel); input n of it (channel, frame, row, column).
        for n, (c, f, i, j) in enumerate(np.ndindex(module.config.in_channels, deep, 2, 2)):
            module.patch_embedding.weight[n, c, f, i, j] = 1.0
            module.head.head.weight[((f * 2 + i) * 2 + j) * module.config.in_channels + c, n] = 1.0
        assert size <= 48
        inputs = spec.inputs(rng(), spec.sizes)
        assert torch.equal(module(**inputs), inputs["x"])


def test_the_positions_are_those_of_time_height_and_width():
    """Two pictures exchanged in time are not two frames of the same video exchanged: the network sees the order."""
    spec = TINY.spec()
    module = random_weights(spec, seed=0)
    inputs = spec.inputs(rng(), spec.sizes)
    with torch.no_grad():
        out = module(**inputs)
        for axis in (2, 3, 4):
            turned = module(**{**inputs, "x": inputs["x"].flip(axis)}).flip(axis)
            assert (turned - out).abs().max() > 1e-4 * out.abs().max()


@pytest.mark.parametrize(("name", "millions"), [("video-dit-wan-1.3b", 1419), ("video-dit-wan-14b", 14288)])
def test_the_published_sizes(name, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in MODELS[name].spec().build().parameters())
    assert round(count / 1e6) == millions


def test_any_duration_height_and_width():
    """The ranges are those of the settings; every size gives itself."""
    spec = MODELS["video-dit-wan-1.3b"].spec()
    assert spec.dynamic["x"] == {0: "batch", 2: "frames", 3: "height", 4: "width"}
    assert [(spec.ranges[name].opt, spec.ranges[name].max) for name in ("frames", "height", "width")] == [(21, 42), (60, 104), (104, 104)]
    # A patch of two frames asks for an even number of them.
    assert set(TINY.spec({"patch_frames": 2}).dynamic["x"]) == {0, 3, 4}
    spec = TINY.spec()
    module = random_weights(spec, seed=0)
    for frames, height, width in ((1, 2, 2), (2, 12, 4), (5, 4, 10)):
        inputs = spec.inputs(rng(), {**spec.sizes, "frames": frames, "height": height, "width": width})
        with torch.no_grad():
            assert module(**inputs).shape == inputs["x"].shape == (2, 4, frames, height, width)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 7}, "multiple of num_heads"),
        ({"freq_dim": 3}, "freq_dim"),
        ({"sample_height": 61}, "sample_height must be a multiple of 2"),
        ({"sample_width": 4096}, "2 to 1024 patches"),
        ({"sample_height": 2}, "2 to 1024 patches"),
        ({"patch_frames": 2}, "sample_frames must be a multiple of 2"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        VideoDiTConfig(**settings)
