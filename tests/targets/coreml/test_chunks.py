"""A model in several packages: the sequence computes what the whole does, bit by bit, and each file of weights is below the limit."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

import isthmus
from isthmus.exporter.errors import UnsupportedError
from isthmus.exporter.quiet import quiet
from isthmus.exporter.trace import trace
from isthmus.targets.coreml.chunks import Chain, cut
from isthmus.targets.coreml.compression import compress
from isthmus.targets.coreml.convert import convert
from isthmus.targets.coreml.interpreter import Interpreter, load
from isthmus.targets.coreml.package import save

WIDTH = 96


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.enter, self.leave = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.leave(nn.functional.gelu(self.enter(self.norm(x)), approximate="tanh"))


class Stack(nn.Module):
    """Blocks with a skip over all of them, one table read by the first and the last, a second output of the middle, and a state."""

    def __init__(self, stateful=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.table = nn.Linear(WIDTH, WIDTH, bias=False)
        if stateful:
            self.register_buffer("total", torch.zeros(1, 4, WIDTH))

    def forward(self, x):
        first = x = self.table(x)
        for block in self.blocks[:2]:
            x = block(x)
        middle = x.mean(1)
        if "total" in dict(self.named_buffers()):
            self.total.mul_(0.5).add_(x)
            x = x + self.total
        for block in self.blocks[2:]:
            x = block(x)
        return self.table(x) + first, middle


@functools.cache
def model(precision="fp16", stateful=False):
    torch.manual_seed(0)
    module = Stack(stateful).eval()
    with quiet():
        program = trace(module, {"x": torch.zeros(1, 4, WIDTH)})
    return convert(program, precision, input_names=["x"], output_names=["y", "middle"])


def given(seed=0):
    return {"x": np.random.Generator(np.random.PCG64(seed)).standard_normal((1, 4, WIDTH), dtype=np.float32)}


@pytest.mark.parametrize("limit", [100_000, 150_000, 250_000])
@pytest.mark.parametrize("how", ["fp16", "fp32", "int8"])
def test_the_sequence_is_the_whole(how, limit, tmp_path):
    whole = model("fp32" if how == "fp32" else "fp16")
    if how == "int8":
        whole, _ = compress(whole, "int8")
    limit = limit * {"fp32": 2, "int8": 0.5}.get(how, 1)
    chunks = cut(whole, int(limit))
    paths = []
    for i, chunk in enumerate(chunks):
        paths.append(tmp_path / f"{i}.mlpackage")
        save(chunk.model, paths[-1])
        (weights,) = paths[-1].rglob("weight*.bin")
        assert weights.stat().st_size <= limit
        assert weights.stat().st_size <= chunk.weights + 64
    total = sum(p.numel() for p in Stack().parameters()) * {"fp32": 4, "int8": 1}.get(how, 2)
    assert len(chunks) >= total / limit
    expected = Interpreter(load(whole)).run(given())
    got = Chain(paths).run(given())
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def test_a_model_below_the_limit_stays_whole():
    (chunk,) = cut(model(), 10**6)
    assert chunk.model is model()
    assert chunk.inputs == ("x",)
    assert set(chunk.outputs) == {"y", "middle"}


def test_a_state_stays_in_one_chunk():
    whole = model(stateful=True)
    chunks = cut(whole, 100_000)
    assert len(chunks) > 2
    assert ["total" in chunk.inputs for chunk in chunks].count(True) == 1
    one, several, interpreter, chain = {}, {}, Interpreter(load(whole)), Chain([chunk.model for chunk in chunks])
    for seed in range(3):
        expected, got = interpreter.run(given(seed), one), chain.run(given(seed), several)
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value)
    assert set(one) == set(several) == {"total"}


def test_a_weight_above_the_limit_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"linear\w*: \d+ bytes of weights cannot be divided, got a limit of 20000"):
        cut(model(), 20_000)


def test_the_command_cuts_and_the_interpreter_runs_the_sequence(tmp_path):
    settings, options = {"depth": 5, "hidden_size": 128}, {"chunk_size": 1}
    manifest = isthmus.export("dit-tiny", "coreml", tmp_path / "out", precision="fp16", settings=settings, options=options).manifest
    assert manifest.verdict == "verified"
    packages = manifest.details["packages"]
    assert packages == [f"model_{i}.mlpackage" for i in range(1, len(packages) + 1)]
    assert len(packages) > 1
    for package in packages:
        assert sum(file.stat().st_size for file in (tmp_path / "out" / package).rglob("weight*.bin")) <= 2**20
    assert isthmus.verify(tmp_path / "out").verdict == "verified"


def test_chunks_of_varying_sizes_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="a model is cut at fixed sizes, got --shapes functions"):
        isthmus.export("dit-tiny", "coreml", tmp_path / "out", options={"chunk_size": 1, "shapes": "functions"})
