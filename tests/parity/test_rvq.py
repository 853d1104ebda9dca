"""Our residual VQ against vector-quantize-pytorch's, rotation trick included, and its state dict in ours."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from vector_quantize_pytorch import ResidualVQ

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights
from isthmus.models.rvq import rotate

from .compare import assert_close, draw

NAMES = ["rvq-tiny", "rvq-shared-tiny", "rvq-soundstream"]


def build_theirs(config, seed):
    torch.manual_seed(seed)
    theirs = ResidualVQ(
        dim=config.dim,
        codebook_size=config.codebook_size,
        num_quantizers=config.num_quantizers,
        shared_codebook=config.shared,
        rotation_trick=True,
    )
    with torch.no_grad():
        for scale, layer in enumerate(theirs.layers):
            layer._codebook.embed.normal_(std=0.7**scale if not config.shared else 1)
    return theirs.eval()


@pytest.mark.parametrize("name", NAMES)
def test_their_weights_in_ours(name, tmp_path):
    config = MODELS[name].config
    theirs = build_theirs(config, seed=3)
    save_file({key: value.clone() for key, value in theirs.state_dict().items()}, tmp_path / "rvq.safetensors")
    spec = MODELS[name].spec()
    with torch.device("meta"):
        ours = spec.build()
    assert load_weights(ours, tmp_path / "rvq.safetensors", spec.layouts).layout == "vector-quantize-pytorch"
    decoder = MODELS[name].spec({"decode": True}).build()
    decoder.load_state_dict(ours.state_dict())
    for seed, length in [(0, 16), (1, 33)]:
        x = draw(spec, seed, length=length)["x"]
        with torch.no_grad():
            quantized, indices, stages = ours(x)
            their_quantized, their_indices, _, their_stages = theirs(x, return_all_codes=True)
        assert torch.equal(indices, their_indices)
        assert_close(quantized, their_quantized)
        assert_close(stages, their_stages.permute(1, 2, 0, 3))
        assert_close(decoder(indices).detach(), theirs.get_output_from_indices(their_indices).detach())


def test_the_rotation_trick_is_theirs():
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    generator = torch.Generator().manual_seed(0)
    x, q, weight = (torch.randn(6, 8, generator=generator) for _ in range(3))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (rotate(ours, q) * weight).sum().backward()
    (rotate_to(theirs, q) * weight).sum().backward()
    assert_close(rotate(ours, q).detach(), rotate_to(theirs, q).detach())
    assert_close(ours.grad, theirs.grad)
