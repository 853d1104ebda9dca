"""GPTQ and bias correction on small layers, and the statistics that they are computed from."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from isthmus.calibration.data import CalibrationData
from isthmus.calibration.observe import Observer
from isthmus.calibration.rounding import _Rounding, bias_correction, factorised, gptq, output_error
from isthmus.calibration.statistics import PEAK_SETS, ROWS, Gathering, moments, peaks
from isthmus.calibration.weights import gathering, gptq_weights
from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.grids import GRIDS, Parameters
from isthmus.exporter.passes import optimise
from isthmus.exporter.passes.fp8_layers import Layer
from isthmus.exporter.passes.quantize_fp8 import weight_scales
from isthmus.exporter.trace import trace


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def correlated(rows, inputs, seed=0, rank=8):
    """Inputs that lie near a space of few dimensions, as those of real layers do."""
    generator = rng(seed)
    return generator.standard_normal((rows, rank)) @ generator.standard_normal((rank, inputs)) + 0.1 * generator.standard_normal(
        (rows, inputs)
    )


def scales_of(weight, grid, groups=1):
    peaks = np.abs(weight).reshape(len(weight), groups, -1).max(axis=2)
    return (peaks if groups > 1 else peaks[:, 0]) / GRIDS[grid].high


def sqnr(reference, got):
    return 10 * np.log10((reference**2).sum() / ((reference - got) ** 2).sum())


def expand(scales, weight):
    return np.repeat(scales.reshape(len(weight), -1), weight.shape[1] // scales.reshape(len(weight), -1).shape[1], axis=1)


@pytest.mark.parametrize(("grid", "groups", "gain"), [("int8", 1, 6.0), ("int4", 1, 6.0), ("int4", 8, 6.0)])
def test_gptq_loses_less_than_nearest_on_inputs_that_vary_together(grid, groups, gain):
    """On other inputs of the same kind than those that it was computed from."""
    weight = rng(1).standard_normal((48, 256))
    generator = rng(2)
    mix, noise = generator.standard_normal((8, 256)), 0.1

    def inputs(n):
        return generator.standard_normal((n, 8)) @ mix + noise * generator.standard_normal((n, 256))

    seen, other = inputs(2000), inputs(500)
    scales = scales_of(weight, grid, groups)
    scale = expand(scales, weight)
    nearest = GRIDS[grid].codes(weight, Parameters(scale, 0.0)) * scale
    codes = gptq(weight, seen.T @ seen, scales, GRIDS[grid])
    exact = other @ weight.T
    assert sqnr(exact, other @ (codes * scale).T) > sqnr(exact, other @ nearest.T) + gain
    assert np.abs(codes).max() <= GRIDS[grid].high
    np.testing.assert_array_equal(codes, np.rint(codes))


def by_elimination(weight, moments, scales, grid):
    """The same greedy rule without blocks and without a factorisation: the inverse of what is left, recomputed at every column."""
    left = weight.copy()
    order = np.argsort(-np.diagonal(moments), kind="stable")
    moments = moments + 0.01 * np.diagonal(moments).mean() * np.eye(len(moments))
    codes = np.zeros_like(weight)
    for position, column in enumerate(order):
        rest = order[position:]
        inverse = np.linalg.inv(moments[np.ix_(rest, rest)])
        codes[:, column] = np.clip(np.rint(left[:, column] / scales), -grid.high, grid.high)
        error = (left[:, column] - codes[:, column] * scales) / inverse[0, 0]
        left[:, rest] -= np.outer(error, inverse[0])
    return codes


def test_gptq_is_what_elimination_gives():
    weight = rng(3).standard_normal((5, 150))  # more columns than a block
    inputs = correlated(400, 150, seed=4)
    scales = scales_of(weight, "int4")
    moments = inputs.T @ inputs
    np.testing.assert_array_equal(gptq(weight, moments, scales, GRIDS["int4"]), by_elimination(weight, moments, scales, GRIDS["int4"]))
    np.testing.assert_array_equal(gptq(weight, moments * 3, scales, GRIDS["int4"]), gptq(weight, moments, scales, GRIDS["int4"]))


@pytest.mark.parametrize("grid", ["e4m3", "int8", "int4"])
def test_rounding_without_new_arrays_is_that_of_the_grid(grid):
    values = np.concatenate([rng(20).standard_normal(2000) * size for size in (1e-4, 0.02, 1, 100, 600)]).astype(np.float32)
    codes = GRIDS[grid].values()
    values = np.concatenate([values, codes, (codes[1:] + codes[:-1]) / 2, [-0.0]]).astype(np.float32)
    found = np.empty_like(values)
    _Rounding(GRIDS[grid], values.size)(values, found)
    np.testing.assert_array_equal(found, GRIDS[grid].codes(values, Parameters(1.0, 0.0)))


def test_one_factor_serves_all_weights_of_an_activation():
    inputs = correlated(300, 40, seed=21)
    factor = factorised(inputs.T @ inputs)
    for seed in (22, 23):
        weight = rng(seed).standard_normal((7, 40))
        scales = scales_of(weight, "int8", groups=5)
        np.testing.assert_array_equal(gptq(weight, factor, scales, GRIDS["int8"]), gptq(weight, inputs.T @ inputs, scales, GRIDS["int8"]))


def test_gptq_comes_near_the_best_rounding_there_is():
    """All roundings up and down of four weights, one after the other."""
    weight, inputs = rng(5).standard_normal((20, 4)), correlated(100, 4, seed=6, rank=2)
    moments = inputs.T @ inputs
    scales = scales_of(weight, "int4")
    found = gptq(weight, moments, scales, GRIDS["int4"], damping=1e-6)
    total = {"best": 0.0, "gptq": 0.0, "nearest": 0.0}
    for row in range(len(weight)):
        down = np.floor(weight[row] / scales[row])
        choices = [np.clip(down + np.array(up), -7, 7) * scales[row] for up in itertools.product((0, 1), repeat=4)]
        total["best"] += min(output_error(weight[row : row + 1], c[None], moments) for c in choices)
        total["gptq"] += output_error(weight[row : row + 1], (found[row] * scales[row])[None], moments)
        nearest = np.clip(np.rint(weight[row] / scales[row]), -7, 7) * scales[row]
        total["nearest"] += output_error(weight[row : row + 1], nearest[None], moments)
    assert total["gptq"] < total["nearest"] / 2
    assert total["gptq"] < 4 * total["best"]


def test_gptq_of_inputs_that_do_not_vary_together_is_nearest():
    weight = rng(7).standard_normal((6, 40))
    scales = scales_of(weight, "int8")
    nearest = np.rint(weight / scales[:, None])
    for gram in (np.eye(40), np.diag(np.arange(40.0)), np.zeros((40, 40))):
        np.testing.assert_array_equal(gptq(weight, gram, scales, GRIDS["int8"]), nearest)


def test_channels_that_are_always_zero_do_no_harm():
    weight, inputs = rng(8).standard_normal((6, 40)), correlated(200, 40, seed=9)
    inputs[:, ::3] = 0
    scales = scales_of(weight, "int4")
    found = gptq(weight, inputs.T @ inputs, scales, GRIDS["int4"])
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[:, ::3], np.rint(weight / scales[:, None])[:, ::3])


def test_moments_that_are_none_are_refused():
    weight = np.ones((2, 3))
    with pytest.raises(IsthmusError, match="second moments"):
        gptq(weight, -np.eye(3), np.ones(2), GRIDS["int8"])
    with pytest.raises(IsthmusError, match="second moments"):
        gptq(weight, np.full((3, 3), np.nan), np.ones(2), GRIDS["int8"])


def test_gptq_takes_fp8():
    weight, inputs = rng(10).standard_normal((16, 96)), correlated(500, 96, seed=11)
    scales = scales_of(weight, "e4m3")
    grid = GRIDS["e4m3"]
    nearest = grid.codes(weight, Parameters(scales[:, None], 0.0)) * scales[:, None]
    found = gptq(weight, inputs.T @ inputs, scales, grid) * scales[:, None]
    moments = inputs.T @ inputs
    assert output_error(weight, found, moments) < output_error(weight, nearest, moments) / 2


def test_the_output_error_is_that_of_the_outputs():
    weight, read, inputs = rng(12).standard_normal((4, 9)), rng(13).standard_normal((4, 9)), correlated(30, 9)
    expected = ((inputs @ weight.T - inputs @ read.T) ** 2).sum()
    assert output_error(weight, read, inputs.T @ inputs) == pytest.approx(expected, rel=1e-12)


def test_bias_correction_makes_the_mean_error_zero():
    """With inputs that are far from 0 on average, rounding shifts the outputs."""
    weight, inputs = rng(14).standard_normal((12, 64)), np.abs(correlated(1000, 64, seed=15))
    scales = scales_of(weight, "int4")[:, None]
    read = GRIDS["int4"].codes(weight, Parameters(scales, 0.0)) * scales
    grid = GRIDS["uint8"]
    read_inputs = grid.read(inputs, grid.parameters(grid.interval(0, np.quantile(inputs, 0.99))))
    added = bias_correction(weight, read, inputs.mean(axis=0), read_inputs.mean(axis=0))
    before = read_inputs @ read.T - inputs @ weight.T
    np.testing.assert_allclose((before + added).mean(axis=0), 0, atol=1e-9)
    assert sqnr(inputs @ weight.T, read_inputs @ read.T + added) > sqnr(inputs @ weight.T, read_inputs @ read.T) + 1
    np.testing.assert_allclose(bias_correction(weight, read, inputs.mean(axis=0)), (weight - read) @ inputs.mean(axis=0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def observed():
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    graph = optimise(onnx_files.to_onnx(trace(net, {"x": torch.randn(4, 5, 12)}), opset=23, input_names=["x"], output_names=["y"]))
    hidden = next(node for node in graph.graph if node.op_type == "Relu").outputs[0].name
    sets = [{"x": rng(i).standard_normal((4, 5, 12), dtype=np.float32)} for i in range(3)]
    rows = np.concatenate([torch.relu(net.up(torch.from_numpy(s["x"]))).numpy().reshape(-1, 20) for s in sets])
    return Observer(graph, ["x", hidden]), sets, hidden, rows.astype(np.float64), net, graph


def test_peaks_are_those_of_pytorch(observed):
    observer, sets, hidden, rows, *_ = observed
    found = peaks(observer, sets, [hidden, "x"])
    np.testing.assert_allclose(found[hidden], np.abs(rows).max(axis=0), rtol=1e-6)
    assert found["x"].shape == (12,)


def test_peaks_are_those_of_sets_that_are_evenly_spaced(observed):
    observer, _, hidden, *_ = observed
    sets = [{"x": np.full((4, 5, 12), i, np.float32)} for i in range(10)]
    assert (peaks(observer, sets, ["x"])["x"] == 7).all()  # of 0, 2, 5 and 7
    assert PEAK_SETS == 4
    assert hidden in peaks(observer, sets[:1], [hidden])


@pytest.mark.parametrize("limit", [1, 2**20])
def test_moments_are_those_of_pytorch(observed, limit):
    observer, sets, hidden, rows, *_ = observed
    found = dict(moments(observer, sets, {"x": 12, hidden: 20}, limit=limit))
    assert list(found) == ["x", hidden]
    assert found[hidden].rows == len(rows)
    np.testing.assert_allclose(found[hidden].gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[hidden].means, rows.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("limit", [1, 2**20])
def test_moments_that_are_gathered_on_the_way_are_those_of_a_pass_of_their_own(observed, limit):
    observer, sets, hidden, *_ = observed
    sizes = {"x": 12, hidden: 20}
    gathered = Gathering(sizes, len(sets), limit=limit)
    assert gathered.names == (["x"] if limit == 1 else ["x", hidden])
    observer.observe(CalibrationData("here", sets), tell=gathered.see)
    found = dict(moments(observer, sets, sizes, gathered=gathered, limit=limit))
    for name, alone in moments(observer, sets, sizes, limit=limit):
        assert found[name].rows == alone.rows
        np.testing.assert_array_equal(found[name].gram, alone.gram)
        np.testing.assert_array_equal(found[name].sums, alone.sums)


def test_of_many_rows_some_are_drawn_from_every_call_and_always_the_same():
    calls = [rng(i).standard_normal((ROWS, 8)).astype(np.float32) + i for i in range(4)]
    found = []
    for _ in range(2):
        gathered = Gathering({"x": 8}, len(calls))
        for call, rows in enumerate(calls):
            gathered.see(call, "x", rows)
        found.append(dict(gathered.found())["x"])
    assert found[0].rows == ROWS
    np.testing.assert_array_equal(found[0].gram, found[1].gram)
    every = np.concatenate(calls).astype(np.float64)
    np.testing.assert_allclose(found[0].means, every.mean(axis=0), atol=0.1)
    np.testing.assert_allclose(found[0].gram / ROWS, every.T @ every / len(every), atol=0.3)
    # never fewer than twice the channels, half of them in each of two calls
    wide = Gathering({"x": 3000}, 2)
    wide.see(0, "x", np.ones((3500, 3000), np.float32))
    assert dict(wide.found())["x"].rows == 3000


@pytest.mark.parametrize("grid", ["int8", "e4m3"])
def test_the_weights_of_a_graph_are_rounded_on_the_inputs_that_they_meet(observed, grid):
    observer, sets, _, rows, net, graph = observed
    layers = [Layer(node.name, "", "weight", (node.inputs[0].name,), 1) for node in graph.graph if node.op_type == "MatMul"]
    found, added = gptq_weights(graph, layers, observer, sets, grid)
    assert [w.codes.shape for w in found.values()] == [(20, 12), (8, 20)]
    down = next(w for w in found.values() if w.codes.shape == (8, 20))
    weight = net.down.weight.numpy()
    if grid == "int8":
        np.testing.assert_array_equal(down.scale, (np.abs(weight).max(axis=1).astype(np.float64) / 127).astype(np.float32))
    else:
        np.testing.assert_array_equal(down.scale, weight_scales(weight, 0, ir.DataType.FLOAT16))
    scale = down.scale.astype(np.float64)
    codes = gptq(weight, rows.T @ rows, scale, GRIDS[grid])
    assert np.mean(down.codes.astype(np.float64) != codes) < 0.02  # the graph's activations are rounded to float32
    read = down.codes.astype(np.float64) * scale[:, None]
    np.testing.assert_allclose(added[layers[1].node], (weight - read) @ rows.mean(axis=0), atol=1e-6)
    assert gptq_weights(graph, [dataclasses.replace(layers[0], kind="attention")], observer, sets, grid) == ({}, {})
    gathered = gathering(graph, layers, len(sets))
    observer.observe(CalibrationData("here", sets), tell=gathered.see)
    again, _ = gptq_weights(graph, layers, observer, sets, grid, gathered=gathered)
    assert all(np.array_equal(again[name].codes, found[name].codes) for name in found)


def test_one_weight_is_read_at_a_time():
    """A graph's weights may be tensors that every read computes: of eight at most two are held at once."""
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __array_finalize__(self, _obj):
            self.counted = False

        def __del__(self):
            nonlocal alive
            alive -= self.counted

    def made(seed):
        nonlocal alive, most
        array = rng(seed).standard_normal((12, 12)).astype(np.float32).view(Counted)
        array.counted = True
        alive += 1
        most = max(most, alive)
        return array

    class Weight(ir.Tensor):
        def __init__(self, seed):
            super().__init__(np.zeros((12, 12), np.float32), name=f"w{seed}")
            self.seed = seed

        def numpy(self):
            return made(self.seed)

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4, 12]))
    weights = [ir.Value(name=f"w{i}", shape=ir.Shape([12, 12]), const_value=Weight(i)) for i in range(8)]
    nodes = [ir.node("MatMul", [x, weight], name=f"n{i}") for i, weight in enumerate(weights)]
    model = ir.Model(
        ir.Graph([x], [node.outputs[0] for node in nodes], nodes=nodes, initializers=weights, opset_imports={"": 20}), ir_version=10
    )
    layers = [Layer(f"n{i}", "", "weight", ("x",), 1) for i in range(8)]
    gathered = gathering(model, layers, 1)
    assert most == 0, "the sizes are known without the numbers"
    gathered.see(0, "x", rng(9).standard_normal((40, 12)).astype(np.float32))
    found, _ = gptq_weights(model, layers, None, [], "int8", gathered=gathered)
    assert len(found) == 8
    assert most <= 2
