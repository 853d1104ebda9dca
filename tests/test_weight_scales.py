"""`--weight-scales`: what the scale of a weight's channel represents, from the calibrator to the artifacts."""

import contextlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import isthmus
from isthmus.calibration.calibrator import channel_calibrators
from isthmus.calibration.weights import scaled_weights, weight_scales
from isthmus.exporter.bundle import read_manifest
from isthmus.exporter.errors import AccuracyError, UsageError
from isthmus.exporter.grids import GRIDS
from isthmus.exporter.passes import quantize_fp8, quantize_int4, quantize_int8
from isthmus.exporter.passes.fp8_layers import Layer

WIDTH = 64


def weight() -> np.ndarray:
    """(outputs, inputs) with one number in each row that is 30 times as large as the others."""
    found = np.random.Generator(np.random.PCG64(5)).standard_normal((WIDTH, WIDTH), dtype=np.float32)
    found[np.arange(WIDTH), np.arange(WIDTH)] *= 30
    return found


def graph(matrix: np.ndarray, axis: int) -> tuple[ir.Model, Layer]:
    stored = matrix if axis == 0 else np.ascontiguousarray(matrix.T)
    text = f"f (float[5, {WIDTH}] x) => (float[5, {WIDTH}] y) {{ y = Gemm<transB = {1 - axis}> (x, w) }}"
    model = onnx.helper.make_model(onnx.parser.parse_graph(text), opset_imports=[onnx.helper.make_opsetid("", 23)])
    model.graph.initializer.append(onnx.numpy_helper.from_array(stored, "w"))
    model.graph.node[0].name = "y"
    return ir.serde.deserialize_model(model), Layer("y", "net", "weight", ("x",), axis, 32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("grid", ["int8", "e4m3", "int4"])
@pytest.mark.parametrize("method", channel_calibrators())
def test_weights_are_nearest_on_the_scales_of_every_calibrator(method, grid, axis):
    matrix = weight()
    model, layer = graph(matrix, axis)
    found = scaled_weights(model, [layer], grid, method)["w"]
    groups = WIDTH // 32 if grid == "int4" else 1
    spread = np.repeat(found.scale.astype(np.float64).reshape(WIDTH, groups), WIDTH // groups, axis=1)
    # Every code of a grid's own list, the nearest by brute force.
    codes = GRIDS[grid].values()
    nearest = np.abs(matrix[..., None] / spread[..., None] - codes).min(axis=-1)
    np.testing.assert_allclose(np.abs(matrix / spread - found.codes.astype(np.float64)), nearest, atol=1e-6)
    if grid == "e4m3":
        np.testing.assert_array_equal(found.scale, found.scale.astype(np.float16).astype(np.float64))
    error = np.square(found.read() - matrix).mean()
    largest = np.square(scaled_weights(model, [layer], grid, "max")["w"].read() - matrix).mean()
    assert error <= largest
    if (method, grid) == ("mse", "int4"):
        assert error < largest


OWN = {
    "int8": lambda matrix: quantize_int8.weight_scales(matrix, 0),
    "e4m3": lambda matrix: quantize_fp8.weight_scales(matrix, 0, ir.DataType.FLOAT16),
    "int4": lambda matrix: quantize_int4.weight_scales(matrix, 0, 32),
}


@pytest.mark.parametrize("grid", OWN)
def test_the_largest_values_are_those_of_the_passes(grid):
    matrix = weight()
    _, layer = graph(matrix, 0)
    np.testing.assert_array_equal(weight_scales(matrix, layer, grid, "max"), OWN[grid](matrix))


def net(inputs: int) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """With a layer of so many inputs, one of which has weights that are 20 times as large as the others."""
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(WIDTH, inputs), nn.GELU(), nn.Linear(inputs, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).eval()
    with torch.no_grad():
        found[2].weight[:, 7] *= 20
    return found, (torch.randn(4, 8, WIDTH),)


CASES = (
    # On 127 codes, cutting one large weight a off pays from some 4200 inputs n on: a scale s = a / 127 that is a share d = 1 - 2^(-1/16)
    # smaller loses (d a)^2 and gains n s^2 / 12 (1 - (1 - d)^2).
    ("onnxruntime", "int8", "nearest", 6144),
    pytest.param("coreml", "w8a8", "nearest", 6144, marks=pytest.mark.matrix),
    ("onnxruntime", "int4", "nearest", WIDTH),
    pytest.param("onnxruntime", "int4", "gptq", WIDTH, marks=pytest.mark.matrix),
    pytest.param("tensorrt", "fp8", "nearest", WIDTH, marks=pytest.mark.matrix),
    ("tensorrt", "fp8", "gptq", WIDTH),
)


@pytest.mark.parametrize(("target", "precision", "rounding", "inputs"), CASES)
def test_an_artifact_has_the_scales_that_were_asked_for(tmp_path, target, precision, rounding, inputs):
    data = {} if (precision, rounding) == ("int4", "nearest") else {"calibration_data": "random"}
    options = {} if target == "coreml" else {f"{precision}_include": ["2"]}
    found = {}
    for scales in ("max", "mse"):
        folder = tmp_path / scales
        with contextlib.suppress(AccuracyError):  # the net is not trained, and what is looked at here are the scales
            isthmus.export(
                net(inputs), target, folder, precision=precision, weight_rounding=rounding, weight_scales=scales, options=options, **data
            )
        assert read_manifest(folder).options["weight_scales"] == scales
        found[scales] = stored(folder, target)
    assert found["max"].shape == found["mse"].shape
    # Both are rounded to half precision, whose numbers are 0.1 % apart at most.
    assert (found["mse"] <= found["max"] * 1.002).all()
    assert (found["mse"] < found["max"] * 0.97).any()


def stored(folder, target) -> np.ndarray:
    """The scales of the weight of the module `2`, sorted."""
    if target == "coreml":
        from isthmus.targets.coreml.interpreter import load
        from isthmus.targets.coreml.lower import operations

        scales = [op.scale.val for op in operations(load(folder / "model.mlpackage")) if op.op_type.startswith("constexpr")]
        return np.sort(np.concatenate([np.asarray(scale, np.float64).ravel() for scale in scales]))
    graph_ = onnx.load(folder / "model.onnx").graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph_.initializer}
    scales = [constants[n.input[1]] for n in graph_.node if n.op_type == "DequantizeLinear" and constants[n.input[1]].size > 1]
    return np.sort(np.concatenate([np.asarray(scale, np.float64).ravel() for scale in scales]))


def test_scales_of_weights_that_stay_wide_are_refused(tmp_path):
    model = net(WIDTH)
    with pytest.raises(UsageError, match="--weight-scales"):
        isthmus.export(model, "onnxruntime", tmp_path / "b", precision="fp32", weight_scales="mse")
    with pytest.raises(UsageError, match="unknown calibrator of weights"):
        isthmus.export(model, "onnxruntime", tmp_path / "b", precision="int8", weight_scales="percentile", calibration_data="random")
