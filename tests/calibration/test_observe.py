"""The values that are observed while a graph runs on calibration data."""

from __future__ import annotations

import gc

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from isthmus.calibration.data import CalibrationData
from isthmus.calibration.observation import Observation
from isthmus.calibration.observe import Observer, check_graph
from isthmus.calibration.session import GraphSession
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.passes import optimise
from isthmus.exporter.spec import MODELS, SizeRange
from isthmus.exporter.trace import dimension_names, trace


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


def test_what_is_seen_is_what_pytorch_computes(net: Net, graph: ir.Model):
    hidden = next(node for node in graph.graph if node.op_type == "Relu").outputs[0].name
    data = CalibrationData("here", sets())
    found = Observer(graph, ["x", hidden]).observe(data)
    assert list(found) == ["x", hidden]
    assert found["x"] == Observation.of(np.stack([s["x"] for s in sets()]))
    expected = [torch.relu(net.up(torch.from_numpy(s["x"]))).numpy() for s in sets()]
    histogram = found[hidden].histogram
    assert (histogram.min, histogram.count) == (0.0, sum(e.size for e in expected))
    assert histogram.max == pytest.approx(max(float(e.max()) for e in expected), rel=1e-6)
    assert len(graph.graph.outputs) == 1  # what was given is as it was


def test_values_are_held_up_to_the_limit_and_seen_all_the_same(graph: ir.Model):
    names = [node.outputs[0].name for node in graph.graph]
    size = 4 * 8 * 256 * 4
    whole = Observer(graph, names)
    parts = Observer(graph, names, limit=size)
    runs = []
    run = parts._session.run

    def counting(inputs, wanted):
        runs.append(wanted)
        return run(inputs, wanted)

    parts._session.run = counting
    data = CalibrationData("here", sets(1))
    assert parts.observe(data) == whole.observe(data)
    assert len(runs) > 2
    assert [name for group in runs for name in group] == names
    assert max(len(group) for group in runs) < len(names)


def test_shards_of_the_data_equal_all_of_it(graph: ir.Model):
    observer = Observer(graph, [node.outputs[0].name for node in graph.graph])
    a, b, whole = (observer.observe(CalibrationData("here", part)) for part in (sets()[:1], sets()[1:], sets()))
    assert {name: a[name].merge(b[name]) for name in a} == whole


class Timed(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grown = torch.relu(x * (1 + t[:, None] / 100))
        return grown * 2, grown.T @ grown


def test_rows_are_told_by_timestep():
    example = {"x": torch.randn(4, 6), "t": torch.rand(4)}
    dynamic = {"x": {0: "batch"}, "t": {0: "batch"}}
    program = trace(Timed(), example, dynamic=dynamic, ranges={"batch": SizeRange(1, 4, 8)})
    names = dimension_names(program, dynamic, example)
    model = optimise(onnx_files.to_onnx(program, opset=23, input_names=["x", "t"], output_names=["y", "z"], dimension_names=names))
    grown = next(node for node in model.graph if node.op_type == "Relu").outputs[0].name
    rng = np.random.Generator(np.random.PCG64(1))
    data = [{"x": rng.standard_normal((3, 6), dtype=np.float32), "t": np.float32([0, 500, 999])} for _ in range(2)]
    found = Observer(model, [grown, "x", "z"]).observe(CalibrationData("here", data, "t"))
    peaks = {0: [], 7: [], 15: []}  # periods of 64
    for arrays in data:
        for row, time in zip(np.maximum(arrays["x"] * (1 + arrays["t"][:, None] / 100), 0), arrays["t"], strict=True):
            peaks[int(time // 64)].append(row.max())
    assert found[grown].periods.exponent == 6
    assert {i: (rows, high) for i, (rows, _, high) in found[grown].periods.found.items()} == {
        i: (2, pytest.approx(max(high), rel=1e-6)) for i, high in peaks.items()
    }
    assert found["x"].periods.found.keys() == peaks.keys()
    assert found["z"].periods.exponent is None  # its rows are no samples


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


def test_a_refusal_names_the_first_values_and_counts_the_others():
    """NaN is passed on to everything behind it."""

    class Deep(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.log(x)
            for _ in range(24):
                x = torch.tanh(x) * 2
            return x

    program = trace(Deep().eval(), {"x": torch.ones(2, 3)})
    model = optimise(onnx_files.to_onnx(program, opset=23, input_names=["x"], output_names=["y"]))
    names = [value.name for node in model.graph for value in node.outputs]
    with pytest.raises(IsthmusError, match="NaN or Inf") as caught:
        Observer(model, names).observe(CalibrationData("here", [{"x": np.full((2, 3), -1, np.float32)}]))
    assert [reason.where for reason in caught.value.reasons] == [*names[:20], ""]
    assert caught.value.reasons[-1].what == f"and {len(names) - 20} more values behind these"
