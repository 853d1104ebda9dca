"""Our FSQ against vector-quantize-pytorch's."""

from __future__ import annotations

import pytest
import torch
from vector_quantize_pytorch import FSQ

from isthmus.exporter.spec import MODELS
from isthmus.models.fsq import FSQConfig, FSQDecoder, FSQEncoder

from .compare import draw


@pytest.mark.parametrize("name", ["fsq-tiny", "fsq-8x5x5x5", "fsq-7x5x5x5x5", "fsq-8x8x8x6x5", "fsq-8x8x8x5x5x5"])
def test_codes_and_indices(name):
    levels = MODELS[name].config.levels
    theirs = FSQ(list(levels)).eval()
    ours = MODELS[name].spec().build()
    for seed, length in [(0, 500), (1, 333)]:
        z = 1.5 * torch.randn(2, length, len(levels), generator=torch.Generator().manual_seed(seed))
        codes, indices = ours(z)
        their_codes, their_indices = theirs(z)
        assert torch.equal(codes, their_codes)
        assert torch.equal(indices, their_indices.long())
        assert torch.equal(FSQDecoder(FSQConfig(levels))(indices), theirs.indices_to_codes(their_indices))


@pytest.mark.parametrize("name", ["fsq-tiny", "fsq-8x8x8x6x5"])
def test_steps_are_at_most_a_few_float32_numbers_away(name):
    """The example latents lie on the steps; moved by 2^-20 of themselves, they are the same in an implementation with a tanh."""
    levels = MODELS[name].config.levels
    theirs, ours = FSQ(list(levels)).eval(), FSQEncoder(FSQConfig(levels))
    z = draw(MODELS[name].spec(), 3)["z"]
    for moved in (z + z.abs() * 2**-19 + 2**-22, z - z.abs() * 2**-19 - 2**-22):
        assert torch.equal(ours(moved)[0], theirs(moved)[0])
