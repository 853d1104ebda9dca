"""What of the consistency models diffusers cannot check; see also `tests/parity/test_consistency.py`."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights
from isthmus.models.consistency import ConsistencyConfig

from .adm_formulas import Authors


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def test_at_the_smallest_noise_it_is_the_identity():
    spec = MODELS["consistency-tiny"].spec()
    module = random_weights(spec, seed=0)
    inputs = spec.inputs(rng(), spec.sizes)
    with torch.no_grad():
        assert torch.equal(module(inputs["x"], torch.full((2,), 0.002), inputs["y"]), inputs["x"])
        assert not torch.equal(module(inputs["x"], torch.full((2,), 0.1), inputs["y"]), inputs["x"])


@pytest.mark.parametrize("sigma", [0.01, 1.0, 80.0])
def test_the_scalings_in_float64(sigma):
    """f is linear in what the network gives: c_skip x for a network of zeros, and c_out more for one of ones."""
    spec = MODELS["consistency-tiny"].spec()
    module = random_weights(spec, seed=0)
    module.unet.conv_out.weight.data.zero_()
    inputs = spec.inputs(rng(), spec.sizes)
    results = []
    with torch.no_grad():
        for constant in (0.0, 1.0):
            module.unet.conv_out.bias.data.fill_(constant)
            results.append(module(inputs["x"], torch.full((2,), sigma), inputs["y"]).double().numpy())
    skip = 0.5**2 / ((sigma - 0.002) ** 2 + 0.5**2)
    out = (sigma - 0.002) * 0.5 / np.sqrt(sigma**2 + 0.5**2)
    x = inputs["x"].double().numpy()
    assert np.abs(results[0] - skip * x).max() <= 1e-6 * np.abs(x).max()
    assert np.abs(results[1] - results[0] - out).max() <= 1e-5 * max(1.0, np.abs(results[0]).max())


def test_the_loop_is_calls_of_f_with_noise_between():
    loop = MODELS["consistency-sampler-tiny"]
    spec = loop.spec()
    module = random_weights(spec, seed=0)
    once = MODELS["consistency-tiny"].spec({"widths": (16,), "attention": (False,)}).build()
    once.load_state_dict(module.state_dict(), strict=True)
    inputs = spec.inputs(rng(), spec.sizes)
    noise, y = inputs["noise"], inputs["y"]
    with torch.no_grad():
        x = once(80.0 * noise[:, 0], torch.full((2,), 80.0), y)
        x = once(x + np.sqrt(0.821**2 - 0.002**2) * noise[:, 1], torch.full((2,), 0.821), y)
        got = module(noise, y)
    assert torch.allclose(got, x, atol=1e-6 * x.abs().max().item())


def test_the_authors_weights(tmp_path):
    """The scaled network alone, on their names; see also the comparison with diffusers in `tests/parity/test_consistency.py`."""
    spec = MODELS["consistency-tiny"].spec()
    theirs = Authors(MODELS["consistency-tiny"].config)
    state = theirs.state(0)
    save_file(state, tmp_path / "theirs.safetensors")
    with torch.device("meta"):
        ours = spec.build()
    assert load_weights(ours, tmp_path / "theirs.safetensors", spec.layouts).layout == "openai/consistency_models"
    inputs = spec.inputs(rng(1), {"batch": 3})
    x, sigma = inputs["x"].double(), inputs["sigma"].double()
    scaled = x / torch.sqrt(sigma**2 + 0.25)[:, None, None, None]
    expected = theirs.forward(state, scaled, inputs["y"], 250 * torch.log(sigma))
    with torch.no_grad():
        got = ours.unet(scaled.float(), 250 * torch.log(inputs["sigma"]), inputs["y"])
    # The sinusoids are computed in float32 by design, at angles up to 1100.
    assert (got - expected).abs().max() <= 2e-5 * np.ptp(expected.numpy())


@pytest.mark.parametrize("name", ["consistency-imagenet64", "consistency-sampler-imagenet64"])
def test_the_published_size(name):
    """As many parameters as the authors' network."""
    with torch.device("meta"):
        count = sum(p.numel() for p in MODELS[name].spec().build().parameters())
    assert count == sum(int(np.prod(shape)) for shape in Authors(MODELS[name].config).shapes.values()) == 295_899_267


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigmas": (1.0, 2.0)}, "must fall"),
        ({"sigmas": (100.0,)}, "must fall"),
        ({"widths": (192, 100, 576, 768)}, "norm_groups"),
        ({"attention": (True,)}, "an entry for each"),
        ({"sample_size": 60}, "multiple of 8"),
        ({"head_dim": 50}, "head_dim"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyConfig(**settings)
