"""RWKV-7 against the paper's formulas in float64, its step against the sequence, and its published sizes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isthmus.exporter.errors import WeightsError
from isthmus.exporter.spec import MODELS
from isthmus.exporter.weights import load_weights, random_weights

TINY, STEP = MODELS["rwkv7-tiny"], MODELS["rwkv7-step-tiny"]


def draw(spec, seed=0, **sizes):
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, w, name):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def rwkv7_fp64(config, w, tokens, shift, state):
    """The network on one sequence, token by token; shift and state are changed in place, the state as the paper has it, (value, key)."""
    size, heads, logits = config.head_size, config.hidden_size // config.head_size, []
    for token in tokens:
        x = layer_norm(w["emb.weight"][token], w, "blocks.0.ln0")
        for i in range(config.depth):
            a = {n.removeprefix(f"blocks.{i}.att."): np.squeeze(v) for n, v in w.items() if n.startswith(f"blocks.{i}.att.")}
            h = layer_norm(x, w, f"blocks.{i}.ln1")
            mixed = {n: h + (shift[i, 0] - h) * a[f"x_{n}"] for n in "rwkvag"}
            shift[i, 0] = h
            r, k, v = (a[f"{long}.weight"] @ mixed[n] for n, long in (("r", "receptance"), ("k", "key"), ("v", "value")))
            # The paper's decay, exp(-exp(-softplus(-d) - 1/2)), is exp(-exp(-1/2) sigmoid(d)).
            d = a["w0"] + np.tanh(mixed["w"] @ a["w1"]) @ a["w2"]
            decay = np.exp(-np.exp(-np.log1p(np.exp(-d)) - 0.5))
            rate = sigmoid(a["a0"] + mixed["a"] @ a["a1"] @ a["a2"])
            if i == 0:
                v_first = v
            else:
                v = v + (v_first - v) * sigmoid(a["v0"] + mixed["v"] @ a["v1"] @ a["v2"])
            kappa = (k * a["k_k"]).reshape(heads, size)
            kappa = kappa / np.sqrt((kappa**2).sum(1, keepdims=True))
            k = k * (1 + (rate - 1) * a["k_a"])
            y = np.zeros((heads, size))
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                s = state[i, head]
                removed = np.outer(s @ kappa[head], kappa[head] * rate[part])
                state[i, head] = s = s * decay[part] - removed + np.outer(v[part], k[part])
                y[head] = s @ r[part]
                y[head] = (y[head] - y[head].mean()) / np.sqrt(y[head].var() + 64e-5)
                y[head] = y[head] * a["ln_x.weight"][part] + a["ln_x.bias"][part]
                y[head] += (r[part] * a["r_k"][head] * k[part]).sum() * v[part]
            gate = sigmoid(mixed["g"] @ a["g1"]) @ a["g2"]
            x = x + a["output.weight"] @ (y.ravel() * gate)
            h = layer_norm(x, w, f"blocks.{i}.ln2")
            inner = h + (shift[i, 1] - h) * np.squeeze(w[f"blocks.{i}.ffn.x_k"])
            shift[i, 1] = h
            x = x + w[f"blocks.{i}.ffn.value.weight"] @ np.maximum(w[f"blocks.{i}.ffn.key.weight"] @ inner, 0) ** 2
        logits.append(w["head.weight"] @ layer_norm(x, w, "ln_out"))
    return np.stack(logits)


def assert_equal(got, expected, bound=5e-6):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= bound * (expected.max() - expected.min())


def scattered(spec, seed):
    """Random weights whose layer norms scale and shift."""
    module = random_weights(spec, seed)
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if ".ln" in name or name.startswith("ln_"):
            parameter.uniform_(0.5, 1.5)
    return module


@pytest.mark.parametrize("settings", [{}, {"depth": 3, "head_size": 8}])
@pytest.mark.parametrize("length", [1, 70])
def test_forward_is_the_formula(settings, length):
    spec = TINY.spec(settings)
    module = scattered(spec, seed=1)
    weights = {name: value.double().numpy() for name, value in module.state_dict().items()}
    inputs = draw(spec, length=length)
    logits, shift, state = module(**inputs)
    for row in range(2):
        carried = inputs["shift"][row].double().numpy().copy()
        matrix = inputs["state"][row].double().numpy().swapaxes(-1, -2).copy()
        expected = rwkv7_fp64(module.config, weights, inputs["tokens"][row].numpy(), carried, matrix)
        assert_equal(logits[row].double(), torch.from_numpy(expected))
        assert_equal(shift[row].double(), torch.from_numpy(carried))
        assert_equal(state[row].double(), torch.from_numpy(matrix.swapaxes(-1, -2)))


def test_step_by_step_is_the_sequence():
    """And a sequence from a carried state is the rest of a longer one."""
    whole = scattered(TINY.spec(), seed=2)
    step = STEP.spec().build()
    step.load_state_dict(whole.state_dict())
    tokens, *zeros = (torch.zeros_like(x) if x.is_floating_point() else x for x in draw(TINY.spec(), length=40).values())
    logits, *last = whole(tokens, *zeros)
    carried, outputs = zeros, []
    with torch.no_grad():
        for token in tokens.unbind(1):
            out, *carried = step(token, *carried)
            outputs.append(out)
    first, *between = whole(tokens[:, :17], *zeros)
    second, *again = whole(tokens[:, 17:], *between)
    for results in ((torch.stack(outputs, 1), *carried), (torch.cat([first, second], 1), *again)):
        for got, expected in zip(results, (logits, *last), strict=True):
            assert_equal(got, expected)


@pytest.mark.parametrize(
    ("name", "ranks"), [("0.1b", (64, 64, 32, 128)), ("0.4b", (64, 64, 32, 128)), ("1.5b", (96, 96, 64, 256)), ("2.9b", (96, 96, 64, 320))]
)
def test_published_sizes(name, ranks):
    """The paper's count: 2 D V + 4 D + L D (12 D + 2 (ranks) + 19) - (2 D r_v + D)."""
    with torch.device("meta"):
        module = MODELS[f"rwkv7-{name}"].spec().build()
    width, depth, vocabulary = module.config.hidden_size, module.config.depth, module.config.vocab_size
    expected = 2 * width * vocabulary + 4 * width + depth * width * (12 * width + 2 * sum(ranks) + 19) - (2 * width * ranks[2] + width)
    assert sum(p.numel() for p in module.parameters()) == expected
    rounded = {"0.1b": 0.191, "0.4b": 0.451, "1.5b": 1.527, "2.9b": 2.948}[name]
    assert abs(expected / 1e9 - rounded) < 6e-4
    assert MODELS[f"rwkv7-step-{name}"].config == dataclasses.replace(module.config, form="step")


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pth_of_tensors(tmp_path, unused, dtype):
    source, module = scattered(TINY.spec(), seed=4), TINY.spec().build()
    state = {name: value.to(dtype) for name, value in source.state_dict().items()}
    if unused:
        state |= {f"blocks.0.att.v{i}": torch.ones(3) for i in range(3)}
    torch.save(state, tmp_path / "RWKV-x070.pth")
    info = load_weights(module, tmp_path / "RWKV-x070.pth", TINY.spec().layouts)
    assert info.layout == ("rwkv-lm" if unused else "isthmus")
    assert ("BF16" in info.dtypes) == (dtype == torch.bfloat16)
    for name, value in module.state_dict().items():
        assert torch.equal(value, source.state_dict()[name].to(dtype).float())


def test_safetensors_is_read_as_well(tmp_path):
    source, module = scattered(TINY.spec(), seed=4), TINY.spec().build()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(module, tmp_path / "w.safetensors", TINY.spec().layouts)
    assert torch.equal(module.head.weight, source.head.weight)


def test_a_pth_of_another_size(tmp_path):
    torch.save(TINY.spec({"depth": 1}).build().state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not fit") as caught:
        load_weights(TINY.spec().build(), tmp_path / "w.pth", TINY.spec().layouts)
    assert any(reason.where.startswith("blocks.1.") for reason in caught.value.reasons)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_size": 12}, "hidden_size must be a multiple of head_size, got 32 and 12"),
        ({"gate_rank": 0}, "gate_rank must be at least 1, got 0"),
        ({"form": "decode"}, "got 'decode'"),
    ],
)
def test_contradicting_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TINY.spec(settings)
