"""Early exit: against its formulas in float64, and that ONNX Runtime computes no layer behind the exit taken."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from isthmus.calibration.cases import cases_of_spec
from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.passes import optimise
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace
from isthmus.exporter.weights import random_weights

NAMES = ["early-exit-tiny", "early-exit-all-tiny"]
TINY = MODELS["early-exit-tiny"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(config, module, batch):
    """Layer by layer and sequence by sequence in float64: the logits of the exit taken, its number, and the confidences seen."""
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def layer(name, x):
        size, mixed = config.hidden_size // config.num_heads, []
        q, k, v = (linear(f"{name}.{part}", x) for part in ("query", "key", "value"))
        for head in range(config.num_heads):
            part = slice(head * size, (head + 1) * size)
            mixed.append(softmax(q[:, part] @ k[:, part].T / math.sqrt(size)) @ v[:, part])
        x = norm(f"{name}.norm1", x + linear(f"{name}.out", np.concatenate(mixed, axis=1)))
        a = linear(f"{name}.fc1", x)
        return norm(f"{name}.norm2", x + linear(f"{name}.fc2", 0.5 * a * (1 + np.vectorize(math.erf)(a / math.sqrt(2)))))

    streams = [
        norm(
            "embeddings.norm",
            state["embeddings.word.weight"][row]
            + state["embeddings.position.weight"][: len(row)]
            + state["embeddings.token_type.weight"][0],
        )
        for row in batch
    ]
    seen = []
    for i in range(config.depth):
        streams = [layer(f"layers.{i}", x) for x in streams]
        logits = np.stack([linear(f"exits.{i}.classifier", np.tanh(linear(f"exits.{i}.pooler", x[0]))) for x in streams])
        p = softmax(logits)
        seen.append(np.mean([1 / (1 - sum(a * math.log(a) for a in row) + 0) for row in p]))
        if seen[-1] > config.threshold or i == config.depth - 1:
            return logits, i + 1, seen
    raise AssertionError


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_formula_at_every_exit(name):
    module = random_weights(MODELS[name].spec(), seed=0)
    taken = set()
    for seed, threshold in ((0, 0.6), (1, 0.6), (2, 0.9), (3, 0.7), (4, 1.0)):
        for batch in (1, 3):
            config = dataclasses.replace(TINY.config, threshold=threshold)
            module.threshold = threshold
            tokens = np.random.default_rng(seed).integers(0, 32, (batch, 7))
            expected, number, seen = oracle(config, module, tokens)
            assert min(abs(c - threshold) for c in seen) > 1e-5
            logits, got = module(torch.from_numpy(tokens))
            assert got.tolist() == [number]
            assert np.abs(logits.numpy() - expected).max() <= 1e-5 * np.ptp(expected)
            taken.add(number)
    assert taken == {1, 2, 3}


def test_the_examples_take_different_exits_and_none_by_a_hair():
    module = random_weights(TINY.spec(), seed=0)
    numbers, seen = zip(
        *(oracle(TINY.config, module, case["tokens"].numpy())[1:] for case in cases_of_spec(TINY.spec(), TINY.spec().sizes, 0).values()),
        strict=True,
    )
    assert set(numbers) == {1, 2}
    assert min(abs(c - TINY.config.threshold) for case in seen for c in case) > 0.02


def test_both_forms_are_equal():
    branches, selects = (random_weights(MODELS[name].spec(), seed=0) for name in NAMES)
    for seed in range(10):
        tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, 32, (2, 5)))
        for got, expected in zip(branches(tokens), selects(tokens), strict=True):
            assert torch.equal(got, expected)


def exported(name):
    spec = MODELS[name].spec()
    module = random_weights(spec, seed=0)
    inputs = spec.inputs(np.random.default_rng(0), spec.sizes)
    model = to_onnx(
        trace(module, inputs, dynamic=spec.dynamic, ranges=spec.ranges), opset=23, input_names=("tokens",), output_names=spec.outputs
    )
    optimise(model)
    return module, model


@pytest.mark.matrix
def test_onnx_runtime_computes_no_layer_behind_the_exit(tmp_path):
    """Counted in its profile: as many layer norms as the embedding and the layers up to the exit have."""
    module, model = exported("early-exit-tiny")
    assert [node.op_type for node in model.graph if node.op_type == "If"] == ["If", "If"]
    data = ir.to_proto(model).SerializeToString()
    taken = set()
    for threshold_seed in range(5):
        tokens = np.random.default_rng(threshold_seed).integers(0, 32, (2, 7))
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / f"profile{threshold_seed}")
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        logits, number = session.run(None, {"tokens": tokens})
        with Path(session.end_profiling()).open() as file:
            events = [event for event in json.load(file) if event.get("name", "").endswith("_kernel_time")]
        computed = sum(event["args"]["op_name"] in ("LayerNormalization", "SkipLayerNormalization") for event in events)
        expected, exit_taken = module(torch.from_numpy(tokens))
        assert number.tolist() == exit_taken.tolist()
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)
        assert computed == 1 + 2 * number[0]
        taken.add(int(number[0]))
    assert taken >= {1, 2}


def test_published_size():
    """BERT-base (109.48 M) with 11 more poolers and classifiers of 2 classes."""
    with torch.device("meta"):
        module = MODELS["early-exit-bert-base"].spec().build()
    pooler, classifier = 768 * 768 + 768, 768 * 2 + 2
    assert sum(p.numel() for p in module.parameters()) == 109_482_240 + classifier + 11 * (pooler + classifier)


@pytest.mark.parametrize(
    "settings", [{"depth": 1}, {"num_heads": 3}, {"threshold": 0.0}, {"threshold": 1.1}, {"num_classes": 1}, {"vocab_size": 0}]
)
def test_contradicting_settings(settings):
    with pytest.raises(ValueError, match=r"must be .*got"):
        dataclasses.replace(TINY.config, **settings)
