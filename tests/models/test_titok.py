"""TiTok against torch's own layers in float64, on the names of the authors' checkpoints."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights

FORMS = ("", "-legacy")


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def vit(state, name, tokens, heads, depth):
    """Blocks between two norms, with `nn.MultiheadAttention`, sequence first as the authors run it."""
    width = tokens.shape[-1]

    def norm(x, key):
        return F.layer_norm(x, (width,), state[f"{key}.weight"], state[f"{key}.bias"])

    x = norm(tokens, f"{name}.ln_pre").transpose(0, 1)
    for i in range(depth):
        block = f"{name}.transformer.{i}"
        attention = nn.MultiheadAttention(width, heads, dtype=torch.float64)
        prefix = f"{block}.attn."
        attention.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
        h = norm(x, f"{block}.ln_1")
        x = x + attention(h, h, h, need_weights=False)[0]
        h = F.linear(norm(x, f"{block}.ln_2"), state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"])
        x = x + F.linear(F.gelu(h), state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
    return norm(x.transpose(0, 1), f"{name}.ln_post")


def encode(config, state, x):
    batch, p = len(x), config.patch_size
    patches = x.reshape(batch, 3, config.grid, p, config.grid, p).permute(0, 2, 4, 1, 3, 5).reshape(batch, config.grid**2, -1)
    patches = patches @ state["encoder.patch_embed.weight"].flatten(1).T + state["encoder.patch_embed.bias"]
    tokens = torch.cat([state["encoder.class_embedding"].expand(batch, 1, -1), patches], 1) + state["encoder.positional_embedding"]
    latents = state["latent_tokens"] + state["encoder.latent_token_positional_embedding"]
    out = vit(state, "encoder", torch.cat([tokens, latents.expand(batch, -1, -1)], 1), config.num_heads, config.depth)
    out = out[:, 1 + config.grid**2 :]
    if config.legacy:
        flat = out.reshape(batch, -1)
        out = torch.stack([flat[:, k :: config.num_latent_tokens] for k in range(config.num_latent_tokens)], 1)
    z = out @ state["encoder.conv_out.weight"].flatten(1).T + state["encoder.conv_out.bias"]
    book = state["quantize.embedding.weight"]
    z, book = z / z.norm(dim=-1, keepdim=True), book / book.norm(dim=-1, keepdim=True)
    return (z[:, :, None] - book).square().sum(-1).argmin(-1)


def decode(config, state, indices, length):
    batch, grid, p = len(indices), config.grid, config.patch_size
    book = state["quantize.embedding.weight"]
    z = (book / book.norm(dim=-1, keepdim=True))[indices]
    for i in range(batch):
        z[i, length[i] :] = 0
    z = z @ state["decoder.decoder_embed.weight"].T + state["decoder.decoder_embed.bias"]
    masks = state["decoder.mask_token"].expand(batch, grid**2, -1)
    masks = torch.cat([state["decoder.class_embedding"].expand(batch, 1, -1), masks], 1) + state["decoder.positional_embedding"]
    z = z + state["decoder.latent_token_positional_embedding"]
    out = vit(state, "decoder", torch.cat([masks, z], 1), config.num_heads, config.depth)[:, 1 : 1 + grid**2]
    first = out @ state["decoder.ffn.0.weight"].flatten(1).T + state["decoder.ffn.0.bias"]
    if not config.legacy:
        image = torch.empty(batch, 3, grid * p, grid * p, dtype=torch.float64)
        for place in range(grid**2):
            row, column = divmod(place, grid)
            pixels = first[:, place].reshape(batch, p, p, 3).permute(0, 3, 1, 2)
            image[:, :, row * p : row * p + p, column * p : column * p + p] = pixels
        return F.conv2d(image, state["decoder.conv_out.weight"], state["decoder.conv_out.bias"], padding=1)
    logits = torch.tanh(first) @ state["decoder.ffn.2.weight"].flatten(1).T + state["decoder.ffn.2.bias"]
    mean = logits.softmax(-1) @ state["pixel_quantize.embedding.weight"]
    return vqgan(config, state, mean.reshape(batch, grid, grid, -1).permute(0, 3, 1, 2))


def vqgan(config, state, x):
    def conv(x, name):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def norm(x, name):
        return F.silu(F.group_norm(x, min(32, config.vqgan_channels), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6))

    def residual(x, name):
        h = conv(norm(conv(norm(x, f"{name}.norm1"), f"{name}.conv1"), f"{name}.norm2"), f"{name}.conv2")
        return h + (conv(h, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in state else x)

    x = conv(x, "pixel_decoder.conv_in")
    for i in range(2):
        x = residual(x, f"pixel_decoder.mid.{i}")
    for level in reversed(range(len(config.vqgan_mult))):
        for i in range(2):
            x = residual(x, f"pixel_decoder.up.{level}.block.{i}")
        if level:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"pixel_decoder.up.{level}.upsample_conv")
    return conv(norm(x, "pixel_decoder.norm_out"), "pixel_decoder.conv_out")


@pytest.mark.parametrize("form", FORMS)
def test_encode(form):
    entry = MODELS[f"titok-encode{form}-tiny"]
    spec, config = entry.spec(), entry.config
    module = random_weights(spec, seed=1)
    state = {key: value.double() for key, value in module.state_dict().items()}
    x = draw(spec, batch=4)["x"]
    indices, count, gradients = module(x)
    assert torch.equal(indices, encode(config, state, x.double()))
    assert indices.unique().numel() > 5
    for i, image in enumerate(x.double().numpy()):
        g = [(np.diff(image, axis=axis) ** 2).mean() for axis in (1, 2)]
        np.testing.assert_allclose(gradients[i], g, rtol=1e-5)
        assert count[i] == 1 + math.ceil(7 * sum(g) / (sum(g) + 0.01))
    assert count.unique().numel() > 1


def test_an_image_of_one_colour_gets_the_least_count():
    module = random_weights(MODELS["titok-encode-tiny"].spec({"min_tokens": 3}), seed=1)
    _, count, gradients = module(torch.full((1, 3, 16, 16), 0.3))
    assert count.tolist() == [3]
    assert gradients.tolist() == [[0, 0]]


@pytest.mark.parametrize("form", FORMS)
def test_decode(form):
    entry = MODELS[f"titok-decode{form}-tiny"]
    spec, config = entry.spec(), entry.config
    module = random_weights(spec, seed=1)
    state = {key: value.double() for key, value in module.state_dict().items()}
    inputs = draw(spec, batch=3) | {"length": torch.tensor([8, 3, 0])}
    got = module(**inputs).double()
    expected = decode(config, state, inputs["indices"], inputs["length"])
    assert (got - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


@pytest.mark.parametrize("form", FORMS)
def test_tokens_after_the_length_do_not_matter_and_those_before_do(form):
    module = random_weights(MODELS[f"titok-decode{form}-tiny"].spec(), seed=1)
    indices, length = torch.arange(8)[None], torch.tensor([5])
    base = module(indices, length)
    for place in range(8):
        other = indices.clone()
        other[0, place] = 20
        assert torch.equal(module(other, length), base) == (place >= 5)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_token_is_a_latent_or_with_legacy_channels_of_all_of_them(legacy):
    """What a prefix of the tokens is made of: K = 8 divides the width of 32."""
    module = random_weights(MODELS["titok-encode-legacy-tiny" if legacy else "titok-encode-tiny"].spec(), seed=1).encoder
    latents = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    module.ln_post = nn.Identity()

    def tokens(latents):
        module.mix = lambda *_: (None, latents)
        return module(torch.zeros(1, 3, 16, 16), torch.zeros(8, 32))[0]

    base = tokens(latents)
    for latent, channel in ((0, 0), (3, 5), (6, 20)):
        other = latents.clone()
        other[0, latent, channel] += 1
        changed = (tokens(other) != base).any(-1).nonzero().flatten().tolist()
        assert changed == ([channel % 8] if legacy else [latent])


@pytest.mark.parametrize("form", FORMS)
def test_both_ends_have_the_same_weights(form):
    encoder, decoder = (MODELS[f"titok-{end}{form}-tiny"].spec().build() for end in ("encode", "decode"))
    decoder.load_state_dict(encoder.state_dict())


@pytest.mark.parametrize(("name", "width", "depth", "count"), [("l-32", 1024, 24, 32), ("b-64", 768, 12, 64), ("s-128", 512, 8, 128)])
def test_published_names_and_shapes(name, width, depth, count):
    """Those of the authors' code, listed from its text."""
    vit = {"class_embedding": (1, width), "positional_embedding": (257, width), "latent_token_positional_embedding": (count, width)}
    for norm in ("ln_pre", "ln_post"):
        vit |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(depth):
        block = f"transformer.{i}"
        vit |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        for layer, out, given in (("attn.out_proj", width, width), ("mlp.c_fc", 4 * width, width), ("mlp.c_proj", width, 4 * width)):
            vit |= {f"{block}.{layer}.weight": (out, given), f"{block}.{layer}.bias": (out,)}
        for norm in ("ln_1", "ln_2"):
            vit |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    expected = {f"{side}.{key}": shape for side in ("encoder", "decoder") for key, shape in vit.items()}
    expected |= {
        "latent_tokens": (count, width),
        "quantize.embedding.weight": (4096, 12),
        "pixel_quantize.embedding.weight": (1024, 256),
        "encoder.patch_embed.weight": (width, 3, 16, 16),
        "encoder.patch_embed.bias": (width,),
        "encoder.conv_out.weight": (12, width, 1, 1),
        "encoder.conv_out.bias": (12,),
        "decoder.decoder_embed.weight": (width, 12),
        "decoder.decoder_embed.bias": (width,),
        "decoder.mask_token": (1, 1, width),
        "decoder.ffn.0.weight": (2 * width, width, 1, 1),
        "decoder.ffn.0.bias": (2 * width,),
        "decoder.ffn.2.weight": (1024, 2 * width, 1, 1),
        "decoder.ffn.2.bias": (1024,),
    }
    with torch.device("meta"):
        module = MODELS[f"titok-encode-{name}"].spec().build()
    got = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert {key: shape for key, shape in got.items() if not key.startswith("pixel_decoder.")} == expected
    pixel = {key: shape for key, shape in got.items() if key.startswith("pixel_decoder.")}
    assert pixel["pixel_decoder.conv_in.weight"] == (512, 256, 3, 3)
    assert pixel["pixel_decoder.up.4.block.0.conv1.weight"] == (512, 512, 3, 3)
    assert pixel["pixel_decoder.up.3.block.0.conv1.weight"] == (256, 512, 3, 3)
    assert pixel["pixel_decoder.up.3.block.0.nin_shortcut.weight"] == (256, 256, 1, 1)
    assert "pixel_decoder.up.3.block.0.conv1.bias" not in pixel
    assert "pixel_decoder.up.0.upsample_conv.weight" not in pixel


@pytest.mark.parametrize(
    "settings", [{"patch_size": 5}, {"num_heads": 3}, {"min_tokens": 9}, {"energy": 0.0}, {"legacy": True, "vqgan_mult": (1, 2)}]
)
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(MODELS["titok-encode-tiny"].config, **settings)
