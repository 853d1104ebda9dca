"""Calibration data from every source, and the ranges that are observed on it."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from isthmus.calibration.data import DEFAULT_SIZE, RANDOM, CalibrationData, calibration_data, check_size
from isthmus.calibration.observe import Observer, check_graph
from isthmus.calibration.session import GraphSession
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.errors import IntegrityError, IsthmusError, UsageError
from isthmus.exporter.passes import optimise
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace
from isthmus.models.flow import RectifiedFlowSampler

EXAMPLE = {"x": np.zeros((2, 1, 4, 4), np.float32), "y": np.zeros(2, np.int64)}


def read(text, **changes):
    arguments = {
        "example": EXAMPLE,
        "dynamic": {"x": (0,), "y": (0,)},
        "sampler": None,
        "run": lambda _: {},
        "draw": lambda rng: {"x": rng.standard_normal((2, 1, 4, 4), dtype=np.float32), "y": np.arange(2)},
        "seed": 3,
    }
    return calibration_data(text, **{**arguments, **changes})


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def one(batch=3):
    return {"x": np.ones((batch, 1, 4, 4), np.float32), "y": np.ones(batch, np.int64)}


def test_random_is_reproducible_and_says_so():
    first, again = read(RANDOM, size=3), read(RANDOM, size=3)
    assert (first.source, len(first.sets)) == ("random", 3)
    assert first.sha256() == again.sha256() != read(RANDOM, size=3, seed=4).sha256()
    assert not np.array_equal(first.sets[0]["x"], first.sets[1]["x"])
    assert len(read(RANDOM).sets) == DEFAULT_SIZE


def test_one_set_in_a_file_several_and_a_folder(tmp_path):
    assert len(read(write(tmp_path / "one.npz", **one())).sets) == 1
    several = write(tmp_path / "two.npz", **{f"{i}/{n}": a for i in range(2) for n, a in one(i + 1).items()})
    data = read(several)
    assert data.source == "two.npz"
    assert [s["x"].shape[0] for s in data.sets] == [1, 2]
    assert len(read(str(tmp_path)).sets) == 3
    assert len(read(str(tmp_path), size=2).sets) == 2


def test_every_fault_of_a_file_is_listed(tmp_path):
    faulty = {
        "0/x": np.full((1, 1, 4, 4), np.nan, np.float32),
        "0/y": np.ones(1, np.int32),
        "1/x": np.ones((1, 1, 5, 4), np.float32),
        "1/z": np.ones(1),
    }
    with pytest.raises(UsageError) as caught:
        read(write(tmp_path / "bad.npz", **faulty))
    assert {(r.where, r.what) for r in caught.value.reasons} == {
        ("bad.npz, 0: x", "holds NaN or Inf"),
        ("bad.npz, 0: y", "has dtype int32, expected int64"),
        ("bad.npz, 1: x", "has shape (1, 1, 5, 4), expected (any, 1, 4, 4)"),
        ("bad.npz, 1: y", "is missing"),
        ("bad.npz, 1: z", "is no input; the inputs are x, y"),
    }


def test_what_is_not_there_or_not_data_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read(str(tmp_path / "none.npz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no \.npz file"):
        read(str(tmp_path / "empty"))
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(IntegrityError, match=r"text\.npz cannot be read"):
        read(str(tmp_path / "text.npz"))
    with pytest.raises(UsageError, match="needs calibration data") as caught:
        read(None)
    assert "`--calibration-data random`" in caught.value.hint
    for size in (0, 2**20):
        with pytest.raises(UsageError, match="calibration-size"):
            check_size(size)


def test_trajectories_are_what_the_model_sees_while_it_samples():
    sampler = RectifiedFlowSampler(shape=(1, 4, 4), labels=(0, 1), names=("a", "b"), null_label=2, steps=4)
    seen = []

    def run(inputs):
        seen.append(inputs["x"].copy())
        return {"sample": inputs["x"] * 0.5}

    example = {"x": EXAMPLE["x"], "t": np.zeros(2, np.float32), "y": EXAMPLE["y"]}
    data = read(None, sampler=sampler, run=run, example=example, size=4)
    assert (data.source, len(data.sets)) == ("trajectories", 4)
    rows = np.concatenate(seen)
    for arrays in data.sets:
        assert arrays["x"].shape == (2, 1, 4, 4)
        assert all(any(np.array_equal(row, r) for r in rows) for row in arrays["x"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def graph(net: Net) -> ir.Model:
    example = {"x": torch.randn(4, 8, 64)}
    program = trace(net, example)
    return optimise(onnx_files.to_onnx(program, opset=23, input_names=["x"], output_names=["y"]))


def sets(count=3):
    return [{"x": np.random.Generator(np.random.PCG64(i)).standard_normal((4, 8, 64), dtype=np.float32)} for i in range(count)]


def test_ranges_are_the_largest_values_over_all_sets(net: Net, graph: ir.Model):
    hidden = next(node for node in graph.graph if node.op_type == "Relu").outputs[0].name
    data = CalibrationData("here", sets())
    found = Observer(graph, ["x", hidden]).observe(data)
    expected = [float(torch.relu(net.up(torch.from_numpy(s["x"]))).max()) for s in sets()]
    assert found.ranges["x"] == max(float(np.abs(s["x"]).max()) for s in sets())
    assert found.ranges[hidden] == pytest.approx(max(expected), rel=1e-6)
    assert dataclasses.asdict(found) | {"ranges": {}} == {
        "ranges": {}, "method": "max", "source": "here", "size": 3, "sha256": data.sha256(),
    }  # fmt: skip
    assert not found.random
    assert len(graph.graph.outputs) == 1  # what was given is as it was


def test_the_float32_graph_is_checked_on_the_way(net: Net, graph: ir.Model):
    observer = Observer(graph, ["x"])
    inputs = {"case": sets(1)[0]}
    good = {"case": {"y": net(torch.from_numpy(sets(1)[0]["x"])).numpy()}}
    assert check_graph(observer, inputs, good).verdict == "verified"
    assert check_graph(observer, inputs, {"case": {"y": good["case"]["y"] * 1.01}}).verdict == "failed"


def test_nan_and_unknown_names_are_named(graph: ir.Model):
    with pytest.raises(IsthmusError, match="no values nothing"):
        Observer(graph, ["nothing"])
    bad = sets(2)
    bad[0]["x"][0, 0, 0] = np.nan
    with pytest.raises(IsthmusError, match="NaN or Inf") as caught:
        Observer(graph, ["x"]).observe(CalibrationData("here", bad))
    assert [r.where for r in caught.value.reasons] == ["x"]


def test_the_weights_are_those_of_the_module(net: Net, graph: ir.Model):
    session = GraphSession(graph)
    before = session.run(sets(1)[0])["y"]
    with torch.no_grad():
        net.up.weight.mul_(2)  # the session reads this very memory
        net.down.weight.neg_()
    try:
        np.testing.assert_allclose(session.run(sets(1)[0])["y"], net(torch.from_numpy(sets(1)[0]["x"])).numpy(), atol=1e-5)
    finally:
        with torch.no_grad():
            net.up.weight.div_(2)
            net.down.weight.neg_()
    np.testing.assert_array_equal(session.run(sets(1)[0])["y"], before)
    assert {node.op_type for node in graph.graph} >= {"MatMul"}  # what was given is as it was


def test_weights_that_are_made_when_they_are_read_live_as_long_as_the_session(net: Net, graph: ir.Model):
    lazy = graph.clone()
    for name in ("up.weight.T", "down.weight.T"):
        array = lazy.graph.initializers[name].const_value.numpy()
        made = ir.LazyTensor(
            lambda array=array: ir.tensor(array.copy()), dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name, cache=False
        )
        lazy.graph.initializers[name].const_value = made
        lazy.graph.initializers[name].meta.clear()
    session = GraphSession(lazy)
    gc.collect()
    filler = [np.full((64, 256), np.nan, np.float32) for _ in range(64)]
    np.testing.assert_allclose(session.run(sets(1)[0])["y"], net(torch.from_numpy(sets(1)[0]["x"])).numpy(), atol=1e-5)
    assert len(filler) == 64


def test_wrong_inputs_are_an_error(graph: ir.Model):
    with pytest.raises(IsthmusError, match="ONNX Runtime failed"):
        GraphSession(graph).run({"x": np.zeros((1, 1, 3), np.float32)})


def test_nothing_reads_weights_before_they_are_there():
    """ONNX Runtime's optimisers move a Transpose past an Add, and so would read DiT's position embedding from the empty file."""
    spec = MODELS["dit-s-2"].spec({"depth": 1})
    torch.manual_seed(1)
    module = spec.build().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.05)
    example = spec.inputs(np.random.Generator(np.random.PCG64(0)), spec.sizes)
    model = optimise(onnx_files.to_onnx(trace(module, example), opset=23, input_names=list(example), output_names=["sample"]))
    got = GraphSession(model).run({name: tensor.numpy() for name, tensor in example.items()})["sample"]
    np.testing.assert_allclose(got, module(*example.values()).numpy(), atol=1e-4)


def test_a_padding_mask_is_written_as_onnx_runtime_wants_it():
    class Cross(nn.Module):
        def forward(self, q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    example = {"q": torch.randn(2, 2, 5, 16), "mask": torch.zeros(2, 1, 1, 5)}
    model = optimise(onnx_files.to_onnx(trace(Cross(), example), opset=23, input_names=["q", "mask"], output_names=["y"]))
    got = GraphSession(model).run({name: tensor.numpy() for name, tensor in example.items()})["y"]
    np.testing.assert_allclose(got, Cross()(**example).numpy(), atol=1e-5)
