"""Our RWKV-7 against the package rwkv (BlinkDL's RWKV_x070), both from one `.pth` with random weights, in sequence and token by token."""

from __future__ import annotations

import pytest
import torch

from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights

from .compare import assert_close, draw

SETTINGS = [{}, {"depth": 3, "head_size": 8, "value_rank": 6, "vocab_size": 70}]


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setenv("RWKV_V7_ON", "1")  # read while the package is imported
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    import rwkv.model

    return rwkv.model.RWKV_x070


def build_both(network, settings, folder):
    spec = MODELS["rwkv7-tiny"].spec(settings)
    source = random_weights(spec, seed=1)
    torch.manual_seed(2)
    for name, parameter in source.named_parameters():
        if ".ln" in name or name.startswith("ln_"):
            parameter.uniform_(0.5, 1.5)
    state = dict(source.state_dict())
    state |= {f"blocks.0.att.v{i}": torch.randn(3) for i in range(3)}  # as in some published files; not read
    torch.save(state, folder / "model.pth")
    ours = spec.build()
    assert load_weights(ours, folder / "model.pth", spec.layouts).layout == "rwkv-lm"
    return spec, ours, network(str(folder / "model"), "cpu fp32")


def carried(state, depth):
    """Their list of states as ours: the shifts (depth, 2, D), and the matrices, which are transposed."""
    shift = torch.stack([torch.stack([state[3 * i], state[3 * i + 2]]) for i in range(depth)])
    return shift, torch.stack([state[3 * i + 1].transpose(-1, -2) for i in range(depth)])


@pytest.mark.parametrize("settings", SETTINGS)
def test_sequence_and_step(network, settings, tmp_path):
    spec, ours, theirs = build_both(network, settings, tmp_path)
    step = MODELS["rwkv7-step-tiny"].spec(settings).build()
    step.load_state_dict(ours.state_dict())
    depth = ours.config.depth
    for seed, length in [(3, 12), (4, 60)]:
        tokens, shift, state = draw(spec, seed, length=length).values()
        shift, state = torch.zeros_like(shift[:1]), torch.zeros_like(state[:1])
        expected, of_theirs = theirs.forward(tokens[0].tolist(), None, full_output=True)
        logits, last_shift, last_state = ours(tokens[:1], shift, state)
        assert_close(logits[0], expected)
        for got, reference in zip((last_shift[0], last_state[0]), carried(of_theirs, depth), strict=True):
            assert_close(got, reference)
        of_theirs = None
        for token in tokens[0]:
            expected, of_theirs = theirs.forward(int(token), of_theirs)
            with torch.no_grad():
                logits, shift, state = step(token[None], shift, state)
            assert_close(logits[0], expected)
        assert_close(shift[0], carried(of_theirs, depth)[0])
        assert_close(state[0], carried(of_theirs, depth)[1])
