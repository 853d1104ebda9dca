"""The shipped weights make digits that a classifier of real digits recognises, and the script that made them trains."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from training import digits, judge
from training.data import digits as load_digits
from training.scan import differentiable_convolution, sequential_scan

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights
from isthmus.models.mamba import causal_convolution, scan

TRAINED = ("dit-digits", "sana-digits", "diffussm-digits")


@pytest.fixture(autouse=True)
def _one_thread():
    # As the script sets it. Models this small run many times slower on two threads of a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_split_is_fixed_and_has_no_picture_twice():
    train, held_out = load_digits()
    assert (len(train.images), len(held_out.images)) == (1347, 450)
    assert (train.images.dtype, train.images.min(), train.images.max()) == (np.float32, 0, 1)
    assert np.bincount(held_out.labels).min() >= 40
    assert judge.distances(held_out.images, train.images).min() > 0
    np.testing.assert_array_equal(train.images, load_digits()[0].images)


def test_the_judge_knows_real_digits():
    assert judge.real_accuracy() >= 0.97


def test_the_judge_finds_faults():
    train, held_out = load_digits()
    real = judge.judge(held_out.images, held_out.labels)
    assert real.sample_accuracy >= 0.97
    assert 0.7 < real.diversity < 1.1
    assert judge.judge(held_out.images, (held_out.labels + 1) % 10).sample_accuracy < 0.05
    same = np.repeat(np.stack([train.images[train.labels == c][0] for c in range(10)]), 3, axis=0)
    copied = judge.judge(same, np.repeat(np.arange(10), 3))
    assert copied.diversity == 0
    assert copied.nearest_to_training == 0


@pytest.mark.parametrize("name", TRAINED)
def test_shipped_weights(name):
    spec = MODELS[name].spec()
    assert spec.weights is not None
    assert spec.weights.stat().st_size < 3_000_000
    with safe_open(spec.weights, "pt") as file:
        assert file.metadata()["model"] == name
    module = spec.build()
    load_weights(module, spec.weights, spec.layouts)
    assert spec.ranges["batch"].max >= max(spec.sampler.batch, 60)

    sampler = digits.flow_sampler(spec)
    images, labels = judge.draw(sampler, digits.torch_step(module, sampler.output), per_class=6, seed=11)
    figures = judge.judge(images, labels)
    assert figures.sample_accuracy >= 0.9
    assert figures.diversity >= 0.5
    assert figures.nearest_to_training > 0.02  # a third of a grey level, root mean square: no copy


def test_training_lowers_the_loss_and_writes_weights(tmp_path, capsys):
    path = tmp_path / "new" / "weights.safetensors"
    digits.main(["dit-digits", "-o", str(path), "--steps", "40", "--batch", "16", "--per-class", "0"])
    report = json.loads(capsys.readouterr().out)
    assert report["last_loss"] < 0.9 * report["first_loss"]
    assert report["bytes"] == path.stat().st_size
    spec = MODELS["dit-digits"].spec()
    load_weights(spec.build(), path, spec.layouts)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["seed"], metadata["steps"], metadata["batch"], metadata["torch"]) == ("0", "40", "16", torch.__version__)


@pytest.mark.parametrize("name", TRAINED)
def test_the_seed_decides(name, tmp_path, capsys):
    def trained(seed, file):
        digits.main([name, "-o", str(tmp_path / file), "--steps", "2", "--batch", "4", "--per-class", "0", "--seed", str(seed)])
        return (tmp_path / file).read_bytes()

    first = trained(3, "a")
    # The metadata's order of keys is the library's choice.
    with safe_open(tmp_path / "a", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    trained(3, "b")
    with safe_open(tmp_path / "b", "pt") as file:
        assert all(torch.equal(file.get_tensor(key), value) for key, value in tensors.items())
    assert trained(4, "c") != first


def scan_inputs(dtype, length=9):
    g = torch.Generator().manual_seed(0)
    u, B, C = (torch.randn(2, length, n, generator=g, dtype=dtype) for n in (4, 3, 3))
    delta = torch.randn(2, length, 4, generator=g, dtype=dtype)
    A, D = -torch.rand(4, 3, generator=g, dtype=dtype), torch.randn(4, generator=g, dtype=dtype)
    return [x.requires_grad_() for x in (u, delta, A, B, C, D, torch.randn(4, generator=g, dtype=dtype))]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_scan_of_training_is_the_scan_of_the_model(reverse):
    inputs = scan_inputs(torch.float32, 64)
    with torch.no_grad():
        expected = scan(*inputs, reverse=reverse)
    torch.testing.assert_close(sequential_scan(*inputs, reverse=reverse), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_gradient_of_the_scan(reverse):
    assert torch.autograd.gradcheck(lambda *inputs: sequential_scan(*inputs, reverse=reverse), scan_inputs(torch.float64))


@pytest.mark.parametrize("carried", [False, True])
def test_the_convolution_of_training_is_the_convolution_of_the_model(carried):
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((2, 5, 9), (5, 1, 4), (5,)))
    state = torch.randn(2, 5, 3, generator=g) if carried else None
    expected = causal_convolution(x, weight, bias, initial_state=state)
    torch.testing.assert_close(differentiable_convolution(x, weight, bias, initial_state=state), expected)
