"""Paged attention against attention over a contiguous cache in float64, written here apart from the model."""

import math

import numpy as np
import pytest
import torch

import isthmus
from isthmus.exporter.spec import MODELS
from isthmus.exporter.target import TARGETS
from isthmus.exporter.weights import random_weights
from isthmus.models.paged_attention import PagedAttentionConfig

TINY = MODELS["paged-attention-tiny"]
CONFIG = TINY.config


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def rotated(x, position):
    """Channel pairs (i, i + d / 2) turned by position * base^(-2 i / d)."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * CONFIG.rope_base ** (-np.arange(half) * 2 / (2 * half)))
    return np.concatenate([z.real, z.imag], axis=-1)


def oracle(w, tokens):
    """The outputs, keys and values of a whole sequence (T, D), token by token and head by head."""
    d, heads, kv = CONFIG.head_dim, CONFIG.num_heads, CONFIG.num_kv_heads
    keys, values, ys = [], [], []
    for position, x in enumerate(tokens):
        q = rotated((w["q_proj.weight"] @ x).reshape(heads, d), position)
        keys.append(rotated((w["k_proj.weight"] @ x).reshape(kv, d), position))
        values.append((w["v_proj.weight"] @ x).reshape(kv, d))
        mixed = []
        for head in range(heads):
            shared = head // (heads // kv)
            scores = np.array([q[head] @ k[shared] / math.sqrt(d) for k in keys])
            p = np.exp(scores - scores.max())
            mixed.append(sum(a * v[shared] for a, v in zip(p / p.sum(), values, strict=True)))
        ys.append(w["o_proj.weight"] @ np.concatenate(mixed))
    return np.array(ys), np.array(keys), np.array(values)


def test_a_stream_through_scattered_pages_is_attention():
    """Two sequences of different lengths decode side by side; their pages lie in the pool in no order, among others' garbage."""
    module = random_weights(TINY.spec(), seed=0)
    w = {name: value.double().numpy() for name, value in module.state_dict().items()}
    lengths = (11, 6)
    tokens = [rng(i).standard_normal((n, CONFIG.hidden_size), dtype=np.float32) for i, n in enumerate(lengths)]
    table = np.array([[5, 0, 3], [2, 6, 1]])
    pages = [torch.full((7, CONFIG.page_size, CONFIG.num_kv_heads, CONFIG.head_dim), 1e4) for _ in range(2)]
    got = [[], []]
    for step in range(max(lengths)):
        rows = [i for i in range(2) if step < lengths[i]]
        with torch.no_grad():
            y, key, value, slot = module(
                torch.from_numpy(np.stack([tokens[i][step] for i in rows])),
                *pages,
                torch.from_numpy(table[rows]),
                torch.full((len(rows),), step, dtype=torch.int64),
            )
        for place, i in enumerate(rows):
            assert slot[place] == table[i][step // CONFIG.page_size] * CONFIG.page_size + step % CONFIG.page_size
            for pool, new in zip(pages, (key, value), strict=True):
                pool.flatten(0, 1)[slot[place]] = new[place]
            got[i].append(y[place].double().numpy())
    for i in range(2):
        expected, keys, _ = oracle(w, tokens[i].astype(np.float64))
        assert np.abs(np.array(got[i]) - expected).max() <= 1e-5 * np.ptp(expected)
        stored = pages[0].flatten(0, 1)[
            [table[i][j // CONFIG.page_size] * CONFIG.page_size + j % CONFIG.page_size for j in range(lengths[i])]
        ]
        assert np.abs(stored.numpy() - keys).max() <= 1e-5 * np.ptp(keys)


def test_a_stream_is_the_sequence_of_softmax_attention():
    """The same weights in the model over sequences."""
    module = random_weights(TINY.spec(), seed=1)
    sequence = MODELS["softmax-attention-tiny"].spec().build()
    sequence.load_state_dict(module.state_dict(), strict=True)
    x = torch.from_numpy(rng(3).standard_normal((1, 10, CONFIG.hidden_size), dtype=np.float32))
    pages = [torch.zeros(3, CONFIG.page_size, CONFIG.num_kv_heads, CONFIG.head_dim) for _ in range(2)]
    with torch.no_grad():
        expected = sequence(x)[0][0]
        for step in range(10):
            y, key, value, slot = module(x[:, step], *pages, torch.tensor([[2, 0, 1]]), torch.tensor([step]))
            for pool, new in zip(pages, (key, value), strict=True):
                pool.flatten(0, 1)[slot] = new
            assert (y[0] - expected[step]).abs().max() <= 1e-5 * (expected.max() - expected.min())


@pytest.mark.matrix
def test_pages_of_2048_tokens_through_onnxruntime(tmp_path):
    """The published page size, with pasts that end before, at and after the boundary of a page, at once and against the oracle."""
    size, lengths = 2048, np.array([0, 2047, 2048, 2049, 4095])
    result = isthmus.export("paged-attention-tiny", "onnxruntime", tmp_path / "out", precision="fp32", settings={"page_size": size}, seed=2)
    assert result.manifest.verdict == "verified"
    stage = next(s for s in TARGETS["onnxruntime"]().stages(tmp_path / "out", result.manifest) if s.name == "onnx")
    module = random_weights(TINY.spec({"page_size": size}), seed=2)
    w = {name: value.double().numpy() for name, value in module.state_dict().items()}
    generator = rng(4)
    d, heads, kv, count = CONFIG.head_dim, CONFIG.num_heads, CONFIG.num_kv_heads, len(lengths)
    table = generator.permutation(2 * count).reshape(count, 2)
    pools = {name: generator.standard_normal((2 * count, size, kv, d), dtype=np.float32) for name in ("key_pages", "value_pages")}
    x = generator.standard_normal((count, CONFIG.hidden_size), dtype=np.float32)
    with stage.open() as runner:
        got = runner.run({"x": x, "block_table": table, "lengths": lengths, **pools})
    for i, length in enumerate(lengths):
        q = rotated((w["q_proj.weight"] @ x[i]).reshape(heads, d), length)
        key, value = (w[f"{name}_proj.weight"] @ x[i] for name in "kv")
        key, value = rotated(key.reshape(kv, d), length), value.reshape(kv, d)
        keys, values = (pools[f"{name}_pages"][table[i]].reshape(2 * size, kv, d)[:length].astype(np.float64) for name in ("key", "value"))
        keys, values = np.concatenate([keys, key[None]]), np.concatenate([values, value[None]])
        scores = np.stack([keys[:, head // (heads // kv)] @ q[head] for head in range(heads)]) / math.sqrt(d)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        mixed = np.concatenate([p[head] @ values[:, head // (heads // kv)] for head in range(heads)])
        expected = {"y": w["o_proj.weight"] @ mixed, "key": key, "value": value}
        for name, array in expected.items():
            assert np.abs(got[name][i] - array).max() <= 1e-5 * np.ptp(array), (name, length)
        assert got["slot"][i] == table[i][length // size] * size + length % size


def test_what_lies_beyond_the_length_has_no_effect():
    spec = TINY.spec()
    module = random_weights(spec, seed=0)
    inputs = spec.inputs(rng(), spec.sizes)
    inputs["block_table"] = torch.tensor([[0, 1], [0, 2]])
    inputs["lengths"] = torch.tensor([3, 5])
    with torch.no_grad():
        first = module(**inputs)
        inputs["key_pages"][0, 3], inputs["value_pages"][2, 1:] = 50.0, -50.0
        again = module(**inputs)
        assert torch.equal(again[0][0], first[0][0]), "the fourth place of page 0 is beyond the first sequence"
        assert not torch.equal(again[0][1], first[0][1]), "the second one reads it"
        inputs["lengths"] = torch.tensor([0, 0])
        y = module(**inputs)[0]
        value = module.v_proj(inputs["x"]).unflatten(-1, (2, 16)).repeat_interleave(2, 1).flatten(1)
        assert torch.allclose(y, module.o_proj(value), atol=1e-6), "a first token sees itself"


def test_the_published_size():
    """One layer of Llama 3 8B (arXiv:2407.21783): width 4096, 32 heads of queries, 8 of keys and values, without biases."""
    config = MODELS["paged-attention-llama3-8b"].config
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.rope_base) == (4096, 32, 8, 500_000)
    with torch.device("meta"):
        module = MODELS["paged-attention-llama3-8b"].spec().build()
    assert sum(p.numel() for p in module.parameters()) == 2 * 4096 * 4096 + 2 * 4096 * 1024 == 41_943_040


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_kv_heads": 3}, "multiple of num_kv_heads"), ({"head_dim": 15}, "even head_dim"), ({"page_size": 0}, "page_size must be")],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        PagedAttentionConfig(**settings)
