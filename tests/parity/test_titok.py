"""Our TiTok against titok-pytorch's, which is that of the paper's figure, put into the place that it has in the authors' code.

It has no class token, no norm before the blocks, no biases but those of patches and feed-forward layers, and tokens as wide as the network.
A further latent takes the class token's part (attention knows no order, and its code is left out), a hook norms what the blocks get, and
our projections to and from tokens are identities. Patches, attention, feed-forward layers, codebook and the order of pixels are compared.
The MaskGIT-VQGAN of the published sizes, and their reading of (K, width) as (width, K), it does not have.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from titok_pytorch import TiTokTokenizer

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights

from .compare import assert_close, draw, fill_zeros

SETTINGS = ({}, {"image_size": 24, "num_latent_tokens": 5, "depth": 3, "width": 48, "num_heads": 3})


def pair(settings):
    """Our two ends and theirs, with the same weights."""
    config = MODELS["titok-encode-tiny"].config
    settings = {**settings, "token_size": settings.get("width", config.width), "codebook_size": 512}
    encode, decode = (MODELS[f"titok-{end}-tiny"].spec(settings) for end in ("encode", "decode"))
    encoder = fill_zeros(random_weights(encode, seed=1), seed=1)
    config, width = encoder.config, encoder.config.width
    patch, latents = config.patch_size, config.num_latent_tokens
    layers = {"depth": config.depth, "heads": config.num_heads, "dim_head": width // config.num_heads}
    theirs = TiTokTokenizer(
        dim=width,
        image_size=config.image_size,
        patch_size=patch,
        num_latent_tokens=latents + 1,
        **{f"{end}_{name}": value for end in ("enc", "dec") for name, value in layers.items()},
        codebook_size=config.codebook_size,
        vq_kwargs={"use_cosine_sim": True},
    ).eval()
    identity = torch.eye(width)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            norm = name.endswith(tuple(f"{part}.bias" for part in ("ln_1", "ln_2", "ln_post")))
            if norm or name.endswith(("in_proj_bias", "out_proj.bias", "conv_out.bias", "decoder_embed.bias")):
                parameter.zero_()
        encoder.encoder.conv_out.weight.copy_(identity[:, :, None, None])
        encoder.decoder.decoder_embed.weight.copy_(identity)
        encoder.decoder.conv_out.weight.zero_()[range(3), range(3), 1, 1] = 1
        class_first = torch.cat([encoder.encoder.class_embedding + encoder.encoder.positional_embedding[:1], encoder.latent_tokens])
        class_first[1:] += encoder.encoder.latent_token_positional_embedding
        theirs.latents.copy_(class_first.roll(-1, 0))
        theirs.pos_emb.copy_(encoder.encoder.positional_embedding[1:])
        theirs.image_to_tokens[1].weight.copy_(encoder.encoder.patch_embed.weight.flatten(1))
        theirs.image_to_tokens[1].bias.copy_(encoder.encoder.patch_embed.bias)
        theirs.mask_tokens.copy_(encoder.decoder.mask_token[0] + encoder.decoder.positional_embedding[1:])
        for mine, their in ((encoder.encoder, theirs.encoder), (encoder.decoder, theirs.decoder)):
            copy_blocks(mine, their)
        pixels = encoder.decoder.ffn[0]
        by_colour = (patch, patch, 3)  # ours are (row, column, colour), theirs (colour, row, column)
        theirs.tokens_to_image[0].weight.copy_(pixels.weight.reshape(*by_colour, width).permute(2, 0, 1, 3).flatten(0, 2))
        theirs.tokens_to_image[0].bias.copy_(pixels.bias.reshape(by_colour).permute(2, 0, 1).flatten())
        theirs.vq.codebook = F.normalize(encoder.quantize.embedding.weight, dim=-1)
    decoder = decode.build()
    decoder.load_state_dict(encoder.state_dict())
    return encode, decode, encoder, decoder, theirs


def copy_blocks(mine, their):
    """Weights of blocks and last norm; the norm before the blocks as a hook."""
    width = mine.config.width
    their.register_forward_pre_hook(lambda _, given: (F.layer_norm(given[0], (width,), mine.ln_pre.weight, mine.ln_pre.bias), *given[1:]))
    given = dict(their.named_parameters())
    taken = set()

    def copy(name, value):
        assert given[name].shape == value.shape, name
        given[name].copy_(value)
        taken.add(name)

    for i, block in enumerate(mine.transformer):
        attention, feed_forward = f"layers.{2 * i}", f"layers.{2 * i + 1}"
        copy(f"{attention}.0.0.gamma", block.ln_1.weight - 1)  # theirs is added to 1
        for part, weight in zip("qkv", block.attn.in_proj_weight.chunk(3), strict=True):
            copy(f"{attention}.1.to_{part}.weight", weight)
        copy(f"{attention}.1.to_out.weight", block.attn.out_proj.weight)
        copy(f"{feed_forward}.0.0.gamma", block.ln_2.weight - 1)
        for name, layer in (("0.0", block.mlp.c_fc), ("2", block.mlp.c_proj)):
            copy(f"{feed_forward}.1.ff.{name}.weight", layer.weight)
            copy(f"{feed_forward}.1.ff.{name}.bias", layer.bias)
    copy("final_norm.gamma", mine.ln_post.weight - 1)
    assert taken == set(given)


@pytest.mark.parametrize("settings", SETTINGS)
@torch.no_grad()
def test_encode(settings):
    spec, _, encoder, _, theirs = pair(settings)
    vectors = []
    theirs.vq.register_forward_pre_hook(lambda _, given: vectors.append(given[0][:, :-1]))
    for seed, batch in ((0, 2), (1, 5)):
        x = draw(spec, seed, batch=batch)["x"]
        indices = encoder(x)[0]
        assert torch.equal(indices, theirs.tokenize(x)[:, :-1])
        assert indices.unique().numel() > 3
        assert_close(encoder.encoder(x, encoder.latent_tokens), vectors[-1])


@pytest.mark.parametrize("settings", SETTINGS)
@torch.no_grad()
def test_decode(settings):
    _, spec, _, decoder, theirs = pair(settings)
    count = decoder.config.num_latent_tokens
    for seed, batch in ((0, 2), (1, 5)):
        inputs = draw(spec, seed, batch=batch)
        inputs["length"] = torch.full((batch,), count)
        codes = theirs.vq.get_output_from_indices(inputs["indices"]) + decoder.decoder.latent_token_positional_embedding
        first = decoder.decoder.class_embedding + decoder.decoder.positional_embedding[:1]
        assert_close(decoder(**inputs), theirs.decode(torch.cat([codes, first.expand(batch, 1, -1)], dim=1)))
