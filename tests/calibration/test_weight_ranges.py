"""The table of weights, against the numbers that were quantised."""

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.calibration.report import write_report
from isthmus.calibration.weight_ranges import weight_table
from isthmus.exporter.ranges import CalibrationTable


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = _load("report_samples")


def saved(path, codes, scale, *, axis=1, zero=None, external=False):
    """A file with one product by stored weights."""
    names = ["codes", "scale", *(["zero"] if zero is not None else [])]
    kinds = {"float8_e4m3fn": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8, "uint8": TensorProto.UINT8}
    tensors = [
        helper.make_tensor("codes", kinds[codes.dtype.name], codes.shape, codes.tobytes(), raw=True),
        numpy_helper.from_array(np.asarray(scale, np.float32), "scale"),
        *([numpy_helper.from_array(zero, "zero")] if zero is not None else []),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", names, ["w"], axis=axis),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    helper.set_metadata_props(nodes[0], {"isthmus.module": "blocks.0.fc"})
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, path, save_as_external_data=external, size_threshold=0)
    return path


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", ["e4m3", "int8"])
def test_the_figures_are_those_of_the_weights(tmp_path, kind, external):
    """With each channel's scale set by all but its largest weights: those are clipped."""
    weights = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    top = 448 if kind == "e4m3" else 127
    scale = np.sort(np.abs(weights), axis=0)[-4] / top
    if kind == "e4m3":
        codes = np.clip(weights / scale, -top, top).astype(ml_dtypes.float8_e4m3fn)
    else:
        codes = np.clip(np.rint(weights / scale), -top, top).astype(np.int8)
    table = weight_table(saved(tmp_path / "model.onnx", codes, scale, external=external))
    ((module, name, shape, grid, low, high, spread, at_end, zero),) = table.rows
    assert (module, name, shape, grid) == ("blocks.0.fc", "codes", "64\u00a0×\u00a08", kind)
    back = codes.astype(np.float32) * scale
    assert (low, high) == (pytest.approx(back.min()), pytest.approx(back.max()))
    assert spread == pytest.approx(scale.max() / scale.min())
    clipped = (np.abs(weights) >= np.sort(np.abs(weights), axis=0)[-4]).mean()
    assert clipped == 4 / 64
    assert at_end == pytest.approx(clipped) if kind == "int8" else at_end >= clipped
    assert zero == pytest.approx((back == 0).mean())


def test_zero_points_and_single_scales(tmp_path):
    codes = np.array([[0, 128], [200, 255]], np.uint8)
    table = weight_table(saved(tmp_path / "a.onnx", codes, 0.5, zero=np.array(128, np.uint8)))
    assert table.rows[0][3:] == ("uint8", -64.0, 63.5, 1.0, 0.5, 0.25)
    codes = np.array([[-127, 1, 0], [3, 0, 127]], np.int8)
    table = weight_table(saved(tmp_path / "b.onnx", codes, [1.0, 4.0], axis=0))
    assert table.rows[0][3:] == ("int8", -127.0, 508.0, 4.0, pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_the_report_of_a_calibrated_bundle_has_them(tmp_path):
    def page(folder):
        write_report(folder, samples.manifest())
        return samples.words((folder / "report.html").read_text())

    codes = np.array([[-127, 1, 0], [3, 0, 127]], np.int8)
    saved(tmp_path / "model.onnx", codes, 1.0)
    assert "Ranges of weights" not in page(tmp_path), "it was not calibrated"
    (tmp_path / "calibration.json").write_text(CalibrationTable.of_ranges({"x": 2.0}, grid="int8").json_text())
    text = page(tmp_path)
    assert "blocks.0.fc codes 2 × 3 int8 -127 127 1 33 % 33 %" in text
    assert "Ranges of activations" in text
    assert "Figures of the target" not in text


def test_a_file_without_stored_weights_has_no_table(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy"]
    onnx.save(helper.make_model(helper.make_graph([node], "g", values[:1], values[1:])), tmp_path / "model.onnx")
    assert weight_table(tmp_path / "model.onnx") is None
