"""FSQ against its formula in exact arithmetic, at half-way values, and both ways."""

from __future__ import annotations

import dataclasses
import itertools

import mpmath
import numpy as np
import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.models.fsq import FSQConfig, FSQDecoder, FSQEncoder, bounded, steps

LEVELS = [(8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5), (3, 4, 16)]


def level_exactly(z, levels):
    """round(bounded(z)) in 60 digits; no float32 is half-way there, because atanh of a rational number is irrational."""
    with mpmath.workdps(60):
        half_l = mpmath.mpf(levels - 1) * mpmath.mpf("1.001") / 2
        offset = mpmath.mpf(levels % 2 == 0) / 2
        return int(mpmath.nint(mpmath.tanh(mpmath.mpf(z) + mpmath.atanh(offset / half_l)) * half_l - offset))


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_are_the_formula(levels):
    rng = np.random.default_rng(0)
    z = (2 * rng.standard_normal((1, 40, len(levels)))).astype(np.float32)
    codes, indices = FSQEncoder(FSQConfig(levels))(torch.from_numpy(z))
    for n in range(z.shape[1]):
        expected = [level_exactly(float(z[0, n, i]), count) for i, count in enumerate(levels)]
        np.testing.assert_array_equal(
            codes[0, n].numpy(), [np.float32(e) / np.float32(c // 2) for e, c in zip(expected, levels, strict=True)]
        )
        index, basis = 0, 1
        for e, count in zip(expected, levels, strict=True):
            index += (e + count // 2) * basis
            basis *= count
        assert indices[0, n] == index


@pytest.mark.parametrize("levels", range(3, 17))
def test_half_way_values_go_to_the_even_level(levels):
    """Around each step are the float32 numbers whose bounded value is exactly half-way; there are some for every step of small channels."""
    found = 0
    encode = FSQEncoder(FSQConfig((levels,)))
    for step in steps(levels):
        near = np.float32(step) * (1 + np.arange(-40, 41, dtype=np.float32) * np.float32(2**-24))
        values = bounded(near, levels)
        half_way = near[values % 1 == 0.5]
        codes, _ = encode(torch.from_numpy(half_way.reshape(1, -1, 1)))
        got = np.round(codes.numpy().reshape(-1) * (levels // 2))
        assert not (got % 2).any()
        np.testing.assert_array_equal(got, np.round(bounded(half_way, levels)))
        found += half_way.size
    assert found


@pytest.mark.parametrize("levels", LEVELS)
def test_steps_are_where_the_formula_in_float32_rises(levels):
    for count in levels:
        table = np.array(steps(count), np.float32)
        assert len(table) == count - 1
        assert np.all(np.diff(table) > 0)
        below = np.nextafter(table, np.float32(-np.inf))
        np.testing.assert_array_equal(np.round(bounded(table, count)) - np.round(bounded(below, count)), 1)


def test_every_code_survives_both_ways():
    config = FSQConfig((8, 6, 5))
    indices = torch.arange(240).reshape(1, -1)
    codes = FSQDecoder(config)(indices)
    every = set(itertools.product(range(-4, 4), range(-3, 3), range(-2, 3)))
    assert {tuple(int(v) for v in row) for row in (codes[0] * torch.tensor([4, 3, 2])).round()} == every
    # atanh of a code's bounded value is a latent that gives the code again.
    half_l, offset = torch.tensor([7, 5, 4]) * 1.001 / 2, torch.tensor([0.5, 0.5, 0.0])
    z = torch.atanh((codes * torch.tensor([4, 3, 2]) + offset) / half_l) - torch.atanh(offset / half_l)
    again, same = FSQEncoder(config)(z)
    assert torch.equal(same, indices)
    assert torch.equal(again, codes)


def test_example_latents_hold_steps():
    spec = MODELS["fsq-tiny"].spec()
    z = spec.inputs(np.random.Generator(np.random.PCG64(0)), spec.sizes)["z"].numpy()
    for channel, count in enumerate((8, 6, 5)):
        assert np.isin(z[..., channel], np.array(steps(count), np.float32)).any()


@pytest.mark.parametrize(
    ("name", "size"), [("8x6x5", 240), ("8x5x5x5", 1000), ("7x5x5x5x5", 4375), ("8x8x8x6x5", 15360), ("8x8x8x5x5x5", 64000)]
)
def test_the_published_sizes(name, size):
    """The levels that the paper recommends in place of 2^8, 2^10, 2^12, 2^14 and 2^16 codes; there is nothing to learn."""
    levels = tuple(int(level) for level in name.split("x"))
    for entry in (MODELS[key] for key in (f"fsq-{name}", f"fsq-decode-{name}") if key in MODELS):
        assert entry.config.levels == levels
        assert not list(entry.spec().build().parameters())
    encoder = MODELS[f"fsq-{name}"].spec().build()
    with torch.no_grad():
        lowest, highest = (encoder(torch.full((1, 1, len(levels)), z))[1].item() for z in (-100.0, 100.0))
    assert (lowest, highest) == (0, size - 1)


def test_extremes():
    codes, indices = FSQEncoder(FSQConfig((8, 5)))(torch.tensor([[[-np.inf, -1e30], [np.inf, 1e30]]]))
    assert codes[0].tolist() == [[-1.0, -1.0], [0.75, 1.0]]
    assert indices[0].tolist() == [0, 39]


@pytest.mark.parametrize("levels", [(), (8, 2), (1290, 1290, 1291)])
def test_contradicting_settings(levels):
    with pytest.raises(ValueError, match=r"levels must be .*, got"):
        dataclasses.replace(MODELS["fsq-tiny"].config, levels=levels)
