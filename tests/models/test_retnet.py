"""RetNet: its three forms against the paper's recurrence in float64 and against each other, and a million tokens through the artifact."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import isthmus
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import random_weights

PARALLEL, CHUNKWISE, RECURRENT = (MODELS[f"retnet-{name}"] for name in ("tiny", "chunkwise-tiny", "recurrent-tiny"))


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def numbers(module):
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def layer_norm(x, state=None, name=""):
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normed if state is None else normed * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


def retnet_fp64(config, state, tokens, first=0):
    """Logits of one sequence: the paper's recurrence with complex keys at absolute positions, the first of which is `first`, from nothing.

    Also the states as the model has them, as seen from the last token.
    """
    heads, pairs = config.num_heads, config.hidden_size // config.num_heads // 2
    thetas = 10000.0 ** -(np.arange(pairs) / (pairs - 1))
    turns = np.exp(1j * np.outer(first + np.arange(len(tokens)), thetas))  # (L, pairs)
    embedding = state["embed_tokens.weight"]
    x = embedding[tokens] * math.sqrt(config.hidden_size)
    states = []
    for i in range(config.depth):
        name = f"layers.{i}.retention"
        h = layer_norm(x, state, f"{name}_layer_norm")
        q, k, v, g = (h @ state[f"{name}.{part}_proj.weight"].T for part in "qkvg")
        q, k = (z.reshape(len(x), heads, pairs, 2) @ np.array([1, 1j]) * turns[:, None] for z in (q, k))
        v = v.reshape(len(x), heads, -1)
        y = np.zeros_like(v)
        for head in range(heads):
            gamma, s = 1 - 2.0 ** (-5 - head), np.zeros((pairs, v.shape[2]), complex)
            for n in range(len(x)):
                s = gamma * s + np.outer(k[n, head], v[n, head])
                y[n, head] = (q[n, head].conj() @ s).real / math.sqrt(2 * pairs)
            seen = s * turns[-1].conj()[:, None]
            states.append(np.stack([seen.real, seen.imag], axis=1).reshape(2 * pairs, -1))
        x = x + (silu(g) * layer_norm(y).reshape(len(x), -1)) @ state[f"{name}.out_proj.weight"].T
        h = layer_norm(x, state, f"layers.{i}.final_layer_norm")
        x = x + gelu(h @ state[f"layers.{i}.ffn.fc1.weight"].T) @ state[f"layers.{i}.ffn.fc2.weight"].T
    return layer_norm(x, state, "layer_norm") @ embedding.T, np.stack(states).reshape(config.depth, heads, 2 * pairs, -1)


def three(seed, settings=None):
    """The same weights in each of the forms."""
    modules = [random_weights(entry.spec(settings), seed) for entry in (PARALLEL, CHUNKWISE, RECURRENT)]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    return modules


def nothing(config, batch):
    key = config.hidden_size // config.num_heads
    return torch.zeros(batch, config.depth, config.num_heads, key, config.value_factor * key)


def assert_equal(got, expected, bound=3e-6):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= bound * (expected.max() - expected.min())


@pytest.mark.parametrize("settings", [{}, {"num_heads": 4, "value_factor": 1}])
@pytest.mark.parametrize("length", [2, 80])
def test_forward_is_the_papers_recurrence(settings, length):
    parallel, chunkwise, recurrent = three(1, settings)
    tokens = draw(PARALLEL.spec(settings), length=length)["tokens"]
    results = [parallel(tokens), chunkwise(tokens, nothing(parallel.config, 2))]
    state, outputs = nothing(parallel.config, 2), []
    for token in tokens.unbind(1):
        out, state = recurrent(token, state)
        outputs.append(out)
    results.append((torch.stack(outputs, 1), state))
    for row in range(2):
        for first in (0, 17):  # where a sequence begins makes no difference
            logits, states = (torch.from_numpy(a) for a in retnet_fp64(parallel.config, numbers(parallel), tokens[row].numpy(), first))
            for got, last in results:
                assert_equal(got[row].double(), logits)
                assert_equal(last[row].double(), states)


def test_the_forms_are_equal():
    """Over several hundred tokens, the two of a stream from the state that the parallel form leaves behind."""
    parallel, chunkwise, recurrent = three(2)
    tokens = draw(PARALLEL.spec(), 3, length=400)["tokens"]
    logits, last = parallel(tokens)
    _, after_prompt = parallel(tokens[:, :200])
    in_chunks, state = [], after_prompt
    for chunk in tokens[:, 200:].split(64, dim=1):  # the last one is shorter
        out, state = chunkwise(chunk, state)
        in_chunks.append(out)
    assert_equal(torch.cat(in_chunks, 1), logits[:, 200:])
    assert_equal(state, last)
    by_token, state = [], after_prompt
    for token in tokens[:, 200:].unbind(1):
        out, state = recurrent(token, state)
        by_token.append(out)
    assert_equal(torch.stack(by_token, 1), logits[:, 200:])
    assert_equal(state, last)


def test_published_size():
    """12 D^2 weights a layer: 8 of the retention, whose values are 2 D wide, and 4 of the feed-forward layer, 2 D wide inside."""
    with torch.device("meta"):
        module = MODELS["retnet-1.3b"].spec().build()
    config = module.config
    assert (config.hidden_size, config.depth, config.ffn_size) == (2048, 24, 4096)
    dense = sum(p.numel() for name, p in module.layers[0].named_parameters() if "norm" not in name)
    assert dense == 12 * config.hidden_size**2
    assert round(sum(p.numel() for p in module.parameters()) / 1e9, 1) == 1.3
    assert not module.cos.is_meta


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "got hidden_size=30, num_heads=4"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"form": "dual"}, "got 'dual'"),
        ({"max_length": 4}, "at least 16, got 4"),
    ],
)
def test_contradicting_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PARALLEL.spec(settings)


@pytest.mark.matrix
@pytest.mark.parametrize("total", [100_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_a_stream_of_tokens_in_constant_memory(total, tmp_path):
    """Each is a call of the recurrent export; 20,000 also go through the chunkwise one, from the state before them.

    What is right at sampled places says the float64 recurrence, which begins 3000 tokens earlier from nothing, at absolute positions: the
    slowest head has forgotten what lies before that (63/64 to the 1500th for each of two layers is 6e-11).
    """
    every, window = total // 20, 3000
    chunks = range(total // 2, total // 2 + 20_000, 1000)
    small = {"vocab_size": 16, "hidden_size": 16, "ffn_size": 16}
    for form in ("chunkwise", "recurrent"):
        result = isthmus.export(f"retnet-{form}-tiny", "onnxruntime", tmp_path / form, precision="fp32", seed=5, settings=small)
        assert result.manifest.verdict == "verified"
    module = random_weights(RECURRENT.spec(small), 5)
    tokens = np.random.Generator(np.random.PCG64(6)).integers(0, module.config.vocab_size, total)
    places = sorted({*range(every, total + 1, every), chunks.start, chunks.stop})
    np.savez(tmp_path / "stream.npz", tokens=tokens, state=nothing(module.config, 1).numpy(), places=places)
    script = Path(__file__).with_name("token_stream.py")
    command = [sys.executable, script, tmp_path / "recurrent" / "model.onnx", tmp_path / "stream.npz", tmp_path / "kept.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    read = np.load(tmp_path / "kept.npz")
    sizes = read["sizes"]
    assert len(sizes) == len(places)
    assert max(sizes) - sizes[0] < 2**20
    kept = dict(zip(places, zip(read["logits"], read["states"], strict=True), strict=True))
    for end in (every, 14 * every, total):
        begin = end - window
        logits, states = retnet_fp64(module.config, numbers(module), tokens[begin:end], begin)
        assert np.abs(kept[end][0] - logits[-1]).max() <= 1e-5 * np.ptp(logits[-1])
        assert np.abs(kept[end][1][0] - states).max() <= 1e-5 * np.ptp(states)
    session = onnxruntime.InferenceSession(str(tmp_path / "chunkwise" / "model.onnx"), providers=["CPUExecutionProvider"])
    state = kept[chunks.start][1]
    for place in chunks:
        logits, state = session.run(None, {"tokens": tokens[None, place : place + chunks.step], "state": state})
    for got, expected in zip((logits[0, -1], state), kept[chunks.stop], strict=True):
        assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)
