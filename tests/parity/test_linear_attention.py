"""The attention of our linear transformer against fla-core's recurrence, normalised, from a state and on."""

from __future__ import annotations

import pytest
import torch
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from torch.nn.functional import elu

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights

from .compare import assert_close, draw


def run_theirs(layer, x, state=None):
    """Their recurrence between our projections; (B, L, D) and the state as ours, values before keys."""
    heads, width = layer.config.num_heads, layer.config.head_dim
    q, k, v = (p(x).unflatten(-1, (heads, width)) for p in (layer.query_projection, layer.key_projection, layer.value_projection))
    before = None if state is None else (state[..., :-1], state[..., -1].unsqueeze(1))
    y, (values, keys) = naive_recurrent_linear_attn(
        elu(q) + 1, elu(k) + 1, v, initial_state=before, output_final_state=True, normalize=True
    )
    return layer.out_projection(y.flatten(2)), torch.cat([values, keys.squeeze(1).unsqueeze(-1)], dim=-1)


@pytest.mark.parametrize("settings", [{}, {"num_heads": 3, "head_dim": 8}])
@pytest.mark.parametrize("name", ["linear-attention-tiny", "linear-attention-step-tiny"])
def test_causal(name, settings):
    spec = MODELS[name].spec({**settings, "eps": 0.0})  # theirs is 1e-10
    layer = random_weights(spec, seed=1).layers[1].attention
    for seed, length in [(0, 12), (1, 90)]:
        drawn = draw(MODELS["linear-attention-tiny"].spec(settings), seed, length=length)
        x, state = 2 * drawn["x"], drawn["state"][:, 1]
        expected, after = run_theirs(layer, x, state)
        if "step" in name:
            outputs = []
            for token in x.unbind(1):
                y, state = layer(token, state)
                outputs.append(y)
            y = torch.stack(outputs, dim=1)
        else:
            y, state = layer(x, state)
        assert_close(y, expected)
        assert_close(state, after)


def test_without_the_mask():
    """Their last token has read all; moved to each place in turn, it says what attention without a mask gives there."""
    spec = MODELS["linear-attention-full-tiny"].spec({"eps": 0.0})
    layer = random_weights(spec, seed=2).layers[0].attention
    x = 2 * draw(spec, 3)["x"]
    y, none = layer(x, None)
    assert none is None
    expected = [run_theirs(layer, torch.cat([x[:, :n], x[:, n + 1 :], x[:, n : n + 1]], dim=1))[0][:, -1] for n in range(x.shape[1])]
    assert_close(y, torch.stack(expected, dim=1))
