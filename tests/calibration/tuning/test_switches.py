"""Switched graphs against numpy and against the graphs that are written, and trials that run them."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from isthmus.calibration.sensitivity import all_flops, predicted, units_of
from isthmus.calibration.switches import switch, switched
from isthmus.calibration.trials import FACTS, WORST, Trials, sqnr_db
from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.passes.fp8_layers import select
from isthmus.exporter.passes.quantize_int8 import QuantizeInt8, choose, kernel_scales, stored, weight_scales
from isthmus.exporter.ranges import CalibrationTable

# Beside the other files that read the graph of `conftest.py`, which is made once a process.
pytestmark = pytest.mark.xdist_group("tuning")


def e4m3(array, scale):
    """What E4M3 reads back: numpy's own cast, not ours."""
    return (np.clip(array / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale).astype(np.float32)


def test_a_switch_quantises_one_module_as_e4m3_does(tuned, folder):
    units = units_of(tuned.graph, tuned.layers("fp8"), {})
    names = [unit.module for unit in units]
    assert sorted(names) == sorted({"attn.qkv", "attn", "attn.proj", "up", "down"})
    trials = Trials(folder)
    image = tuned.sets[2]
    reference = trials.run(image, ())["y"]
    with torch.no_grad():
        np.testing.assert_allclose(reference, tuned.net(torch.from_numpy(image["image"])).numpy(), atol=2e-6)
    # The last layer, in numpy: the scales are float16 numbers, rounded upwards.
    with torch.no_grad():
        x = tuned.net.stem(torch.from_numpy(image["image"])).flatten(2).transpose(1, 2)
        x = x + tuned.net.attn(x)
        hidden = torch.relu(tuned.net.up(x)).numpy()
    seen = tuned.table.values[next(unit for unit in units if unit.module == "down").layers[0].observed[0]].amax

    def scale(largest):
        half = np.float16(largest / 448)
        return np.float32(half if half >= largest / 448 else np.nextafter(half, np.float16(np.inf)))

    weight = tuned.net.down.weight.detach().numpy()
    rows = np.array([scale(row) for row in np.abs(weight).max(1)], np.float32)
    down = e4m3(hidden, scale(seen)) @ e4m3(weight, rows[:, None]).T + tuned.net.down.bias.detach().numpy()
    expected = x.numpy() + down
    found = trials.run(image, {names.index("down")})["y"]
    # A value at the border between two codes may fall to either side.
    assert np.mean(np.abs(found - expected) > 1e-5) < 0.01
    np.testing.assert_allclose(found, expected, atol=0.02)
    (noise,) = trials.noise({names.index("down")})
    assert noise == pytest.approx(np.square(expected - reference).sum() / np.square(reference).sum(), rel=0.02)


def test_everything_switched_on_in_int8_is_the_graph_that_is_written(tuned, tmp_path):
    units = tuned.write(tmp_path / "int8", "int8")
    layers = tuned.layers("int8")
    written = tuned.graph.clone()
    QuantizeInt8(layers, {name: tuned.table.interval(name, "uint8") for x in layers for name in x.observed})(written)
    ir.save(written, tmp_path / "written.onnx")
    session = ort.InferenceSession(str(tmp_path / "written.onnx"), providers=["CPUExecutionProvider"])
    (expected,) = session.run(["y"], tuned.sets[2])
    trials = Trials(tmp_path / "int8")
    found = trials.run(tuned.sets[2], range(len(units)))["y"]
    # Sums in int32 there, in float32 here; a value on the border between two codes may fall to either side.
    assert np.mean(np.abs(found - expected) > 1e-4) < 0.02
    assert 20 < sqnr_db(trials.noise(range(len(units)))) < 60


def test_corrections_are_added_where_the_switch_is_on(tuned, tmp_path):
    layer = next(x for x in tuned.layers("int8") if x.module == "down")
    added = np.arange(32, dtype=np.float32)
    units = tuned.write(tmp_path / "plain", "int8")
    tuned.write(tmp_path / "corrected", "int8", corrections={layer.node: added})
    plain, corrected = Trials(tmp_path / "plain"), Trials(tmp_path / "corrected")
    on = {next(i for i, unit in enumerate(units) if unit.module == "down")}
    inputs = tuned.sets[2]
    np.testing.assert_array_equal(plain.run(inputs, ())["y"], corrected.run(inputs, ())["y"])
    np.testing.assert_allclose(corrected.run(inputs, on)["y"] - plain.run(inputs, on)["y"], np.broadcast_to(added, (2, 16, 32)), atol=1e-5)


def test_errors_of_single_modules_nearly_add_up(folder):
    trials = Trials(folder)
    count = json.loads((folder / FACTS).read_text())["switches"]
    alone = [trials.noise({i}) for i in range(count)]
    assert all(noise[0] > 0 for noise in alone)
    assert sqnr_db(predicted(alone, range(count))) == pytest.approx(sqnr_db(trials.noise(range(count))), abs=3)
    assert predicted(alone, ()) == ()


def test_sqnr():
    assert sqnr_db([0.01, 0.001]) == pytest.approx(20)
    assert (sqnr_db([0.0]), sqnr_db([WORST])) == (300, -300)


def test_a_folder_that_cannot_be_run(folder, tmp_path):
    with pytest.raises(IsthmusError, match="cannot be run"):
        Trials(tmp_path)
    with pytest.raises(IsthmusError, match="failed on a trial"):
        Trials(folder).run({"image": np.zeros((2, 3, 8, 8), np.float64)}, ())


def test_operations_are_those_that_torch_counts(tuned):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tuned.net(tuned.example["image"])
    # scaled_dot_product_attention on the CPU is not one of the operators that torch counts: 2 products of 16 x 16 x 16, 2 heads, 2 rows.
    attention = 2 * 2 * 2 * 2 * 16 * 16 * 16
    counted = counter.get_total_flops()
    assert all_flops(tuned.graph, {}) in (counted, counted + attention)
    assert sum(unit.flops for unit in units_of(tuned.graph, tuned.layers("fp8"), {})) < all_flops(tuned.graph, {})


CONVOLUTIONS = """<ir_version: 11, opset_import: ["" : 23]>
f (float[2, 16, 6, 6] x) => (float[2, 16, 6, 6] y) {
  c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
  r = Relu (c)
  z = Conv <pads = [1, 1, 1, 1]> (r, v, d)
  y = Neg (z)
}"""


def convolutions(rng):
    """Two convolutions, a Relu between them. The second has a channel whose bias, not its weights, gives the scale (`kernel_scales`)."""
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in {"w": (32, 16, 3, 3), "v": (16, 32, 3, 3)}.items()}
    arrays |= {"b": rng.standard_normal(32, np.float32), "d": rng.standard_normal(16, np.float32)}
    arrays["v"][3] /= 20
    arrays["d"][3] = 1e6
    model = ir.from_onnx_text(CONVOLUTIONS)
    for name, array in arrays.items():
        value = next(v for node in model.graph for v in node.inputs if v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        model.graph.register_initializer(value)
    ir.passes.common.ShapeInferencePass()(model)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model, arrays


def test_convolutions_switched_on_in_int8_are_those_that_are_written():
    rng = np.random.Generator(np.random.PCG64(0))
    model, arrays = convolutions(rng)
    layers, excluded = choose(select(model, include=["*"]), model)
    assert [layer.observed for layer in layers] == [("x", "r"), ("r", "z")]
    assert not excluded
    table = CalibrationTable.of_ranges({"x": 3.0, "r": 40.0, "z": 1e6}, grid="uint8")
    intervals = {name: table.interval(name, "uint8") for name in table.values}
    floor = kernel_scales(arrays["v"], arrays["d"], float(stored(intervals["r"])[0])) > weight_scales(arrays["v"], 0)
    assert floor.nonzero()[0].tolist() == [3]
    written = model.clone()
    QuantizeInt8(layers, intervals)(written)
    on = switched(model, [(layer, i) for i, layer in enumerate(layers)], table, "int8")

    def stored_in(graph):
        arrays = [value.const_value.numpy() for name, value in graph.initializers.items() if name not in model.graph.initializers]
        return {(str(a.dtype), a.shape, a.tobytes()) for a in arrays}

    assert stored_in(written.graph) == stored_in(on.graph), "codes, scales and zero points"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    inputs = {"x": rng.standard_normal((2, 16, 6, 6), np.float32)}
    found = []
    for graph, given in ((written, inputs), (on, inputs | {switch(i): np.array(True) for i in range(len(layers))})):
        session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
        found += session.run(["y"], given)
    np.testing.assert_array_equal(*found)
