"""Our RetNet against yet-another-retnet, layer by layer in its three forms, and against fla-core's retention.

Theirs differs from the paper in the decays (log-spaced from 1 - 1/32 to 1 - 1/512), which are replaced, and in the width of the values,
which is that of the keys. It has biases, which are set to 0, and keeps its state at absolute angles with keys divided by sqrt(d).
"""

from __future__ import annotations

import pytest
import torch
from fla.ops.retention.naive import naive_retention
from torch.nn.functional import gelu, silu
from yet_another_retnet import retention
from yet_another_retnet.retnet import RetNetDecoderLayer

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights
from isthmus.models.retnet import turn

from .compare import assert_close

SIZES = [(32, 2, 12), (48, 3, 90)]
"""Width, heads, length; they want 8 channels a head or a multiple of it."""
FORMS = ("parallel", "chunkwise", "recurrent")


@pytest.fixture(autouse=True)
def _the_papers_decays(monkeypatch):
    def gammas(num_heads, device=None, dtype=None):
        return 1 - 2 ** (-5 - torch.arange(num_heads, device=device, dtype=dtype))

    monkeypatch.setattr(retention, "_build_decay_gammas", gammas)
    retention._build_decay_mask.cache_clear()
    yield
    retention._build_decay_mask.cache_clear()


def build_both(form, width, heads):
    settings = {"hidden_size": width, "num_heads": heads, "value_factor": 1, "ffn_size": 3 * width, "form": form}
    ours = random_weights(MODELS["retnet-tiny"].spec(settings), seed=1)
    layer = ours.layers[1]
    theirs = RetNetDecoderLayer(width, heads, dim_feedforward=3 * width, dropout=0.0, activation=gelu).eval()
    theirs.retention.activation = silu
    torch.manual_seed(2)
    with torch.no_grad():
        for norm in (layer.retention_layer_norm, layer.final_layer_norm):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        for parameter in theirs.parameters():
            parameter.zero_()
    names = {"retention_layer_norm": "norm1", "final_layer_norm": "norm2", "ffn.fc1": "linear1", "ffn.fc2": "linear2"}
    state = {}
    for name, value in layer.state_dict().items():
        module, _, kind = name.rpartition(".")
        state[f"{names.get(module, module)}.{kind}"] = value
    absent = theirs.load_state_dict(state, strict=False)
    assert not absent.unexpected_keys
    assert all(key.endswith((".bias", ".thetas")) for key in absent.missing_keys)
    return ours, layer, theirs


def as_ours(state, position, ours):
    """Their state after the token at `position`, turned back by its angle, with keys as they are."""
    cos, sin = ours.cos[position].unsqueeze(-1), ours.sin[position].unsqueeze(-1)
    return turn(state * state.shape[-2] ** 0.5, cos, -sin, -2)


@pytest.mark.parametrize(("width", "heads", "length"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_layer(form, width, heads, length):
    ours, layer, theirs = build_both(form, width, heads)
    tables = (ours.cos, ours.sin)
    for seed in (3, 4):
        torch.manual_seed(seed)
        x = torch.randn(2, length, width)
        with torch.no_grad():
            expected = theirs.forward_parallel(x)
            half = length // 2
            _, middle = theirs.forward_chunkwise(x[:, :half], 0)
            rest, last = theirs.forward_chunkwise(x[:, half:], half, middle)
        zeros = torch.zeros_like(last)
        if form == "parallel":
            y, state = layer(x, None, tables, ours.decay)
        elif form == "chunkwise":
            y, state = layer(x[:, :half], zeros, tables, ours.decay)
            assert_close(state, as_ours(middle, half - 1, ours))
            more, state = layer(x[:, half:], state, tables, ours.decay)
            assert_close(more, rest)
            y = torch.cat([y, more], dim=1)
        else:
            outputs, state, of_theirs = [], zeros, None
            for n, token in enumerate(x.unbind(1)):
                with torch.no_grad():
                    one, of_theirs = theirs.forward_recurrent(token, n, of_theirs)
                mine, state = layer(token, state, tables, ours.decay)
                assert_close(mine, one)
                assert_close(state, as_ours(of_theirs, n, ours))
                outputs.append(mine)
            y = torch.stack(outputs, dim=1)
        assert_close(y, expected)
        assert_close(state, as_ours(last, length - 1, ours))


@pytest.mark.parametrize(("width", "heads", "length"), SIZES)
def test_the_retention_alone(width, heads, length):
    """fla-core's takes queries and keys that are turned already."""
    ours = random_weights(MODELS["retnet-tiny"].spec({"hidden_size": width, "num_heads": heads}), seed=1)
    mix, key = ours.layers[0].retention, width // heads
    torch.manual_seed(5)
    q, k, v = torch.randn(2, length, width), torch.randn(2, length, width), torch.randn(2, length, 2 * width)
    cos, sin = ours.cos[:length], ours.sin[:length]
    queries, keys = (turn(z.unflatten(-1, (heads, key)).transpose(1, 2), cos, sin, -1) for z in (q, k))
    expected = naive_retention(queries, keys, v.unflatten(-1, (heads, 2 * key)).transpose(1, 2)).transpose(1, 2).flatten(2)
    zeros = torch.zeros(2, heads, key, 2 * key)
    assert_close(mix.parallel(q, k, v, (ours.cos, ours.sin), ours.decay)[0], expected)
    assert_close(mix.chunkwise(q, k, v, zeros, (ours.cos, ours.sin), ours.decay)[0], expected)
