"""QuantizeInt8: the graph before and after, and what it computes, against arithmetic in integers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.grids import Interval, RoundedWeight
from isthmus.exporter.passes.fp8_layers import Layer, select
from isthmus.exporter.passes.quantize_int8 import QuantizeInt8, choose, kernel_scales, stored, weight_scales
from isthmus.exporter.passes.scope import MODULE

RNG = np.random.Generator(np.random.PCG64(0))
STATE = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """The same numbers for a test in whatever order they run."""
    RNG.bit_generator.state = STATE


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def model_of(text, weights):
    """A model whose nodes are named, and made for modules that are named, after their first outputs."""
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 23]> {text}')
    for name, array in weights.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        model.graph.register_initializer(value)
    ir.passes.common.ShapeInferencePass()(model)
    for node in model.graph:
        node.name = node.outputs[0].name
        node.metadata_props[MODULE] = f"net.{node.name}"
    return model


def run(model, inputs, *, disable=True):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_DISABLE_ALL if disable else level.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, inputs)


def expected(x, weight, interval):
    """y = s_x s_w sum (q_x - z) q_w, in int64: the formula of ONNX's specification."""
    scale = np.float32((interval.high - interval.low) / 255)
    zero = round(-interval.low / float(scale))
    q = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64)
    factors = (np.abs(weight).max(axis=0).astype(np.float64) / 127).astype(np.float32)
    w = np.clip(np.rint(weight / factors), -127, 127).astype(np.int64)
    return ((q - zero) @ w) * (float(scale) * factors.astype(np.float64))


TEXT = "f (float[b, 4, 16] x) => (float[b, 4, 32] y) { y = MatMul (x, w) }"
RANGE = Interval(-1.5, 3.0)


def test_a_product_becomes_one_of_integers():
    weight, x = normal(16, 32), normal(2, 4, 16)
    model = model_of(TEXT, {"w": weight})
    quantize = QuantizeInt8([Layer("y", "net.y", "weight", ("x",), 1)], {"x": RANGE})
    assert quantize(model).modified
    assert quantize.written == [("y", "net.y")]
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    assert [v.name for v in model.graph.outputs] == ["y"]
    initializers = model.graph.initializers
    assert {name: (v.dtype.name, list(v.shape)) for name, v in initializers.items()} == {
        "x.scale": ("FLOAT", []), "x.zero_point": ("UINT8", []), "w.int8": ("INT8", [16, 32]), "w.scale": ("FLOAT", [32]),
    }  # fmt: skip
    np.testing.assert_allclose(run(model, {"x": x})[0], expected(x, weight, RANGE), rtol=1e-5, atol=1e-5)
    # Fused, ONNX Runtime sums up in int32.
    np.testing.assert_allclose(run(model, {"x": x}, disable=False)[0], expected(x, weight, RANGE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_becomes_a_product_and_its_bias(transposed):
    weight, bias, x = normal(16, 32), normal(32), normal(5, 16)
    text = f"f (float[b, 16] x) => (float[b, 32] y) {{ y = Gemm <transB = {transposed}> (x, w, c) }}"
    model = model_of(text, {"w": weight.T.copy() if transposed else weight, "c": bias})
    QuantizeInt8([Layer("y", "net.y", "weight", ("x",), 0 if transposed else 1)], {"x": RANGE})(model)
    assert [node.op_type for node in model.graph] == [
        "Unsqueeze", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add", "Squeeze",
    ]  # fmt: skip
    assert model.graph.initializers["w.int8"].shape == [16, 32]
    assert "w" not in model.graph.initializers
    np.testing.assert_allclose(run(model, {"x": x})[0], expected(x, weight, RANGE) + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["b, 4, 16", "2, 4, 16", "b, 2, 2, 16", "b, 16", "4, 16"])
def test_onnx_runtime_computes_it_in_integers(shape, tmp_path):
    """Also where shapes are static, for which it would make a float Gemm of a product with a vector added."""
    weight, bias = normal(16, 32), normal(32)
    out = shape.replace("16", "32")
    body = "y = Gemm (x, w, c)" if shape.count(",") == 1 else "p = MatMul (x, w) y = Add (p, c)"
    model = model_of(f"f (float[{shape}] x) => (float[{out}] y) {{ {body} }}", {"w": weight, "c": bias})
    layer = Layer(next(iter(model.graph)).name, "net", "weight", ("x",), 1)
    QuantizeInt8([layer], {"x": RANGE})(model)
    proto, options = ir.to_proto(model), onnxruntime.SessionOptions()
    onnx.checker.check_model(proto, full_check=True)
    options.optimized_model_filepath = str(tmp_path / "made.onnx")
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "made.onnx").graph.node]
    assert "MatMulIntegerToFloat" in operators
    assert not {"MatMul", "Gemm", "FusedMatMul", "DequantizeLinear"} & set(operators)
    x = normal(*(int(size) if size.strip().isdecimal() else 3 for size in shape.split(",")))
    (got,) = session.run(None, {"x": x})
    np.testing.assert_allclose(got, expected(x, weight, RANGE) + bias, rtol=1e-5, atol=1e-5)


def test_what_several_layers_read_is_quantised_once():
    text = (
        "f (float[b, 16] x) => (float[b, 32] y, float[b, 32] z, float[b, 32] u) { y = MatMul (x, w) z = MatMul (x, w) u = MatMul (x, w2) }"
    )
    model = model_of(text, {"w": normal(16, 32), "w2": normal(16, 32)})
    layers = [Layer(name, f"net.{name}", "weight", ("x",), 1) for name in "yzu"]
    QuantizeInt8(layers, {"x": RANGE})(model)
    operators = [node.op_type for node in model.graph]
    assert (operators.count("QuantizeLinear"), operators.count("DequantizeLinear"), operators.count("MatMul")) == (1, 3, 3)
    run(model, {"x": normal(3, 16)})


def test_rounded_weights_and_corrections_are_taken():
    weight, x = normal(16, 32), normal(6, 4, 16)
    codes, scale, added = RNG.integers(-127, 128, (16, 32)).astype(np.int8), np.full(32, 0.5, np.float32), normal(32)
    model = model_of(TEXT, {"w": weight})
    layer = Layer("y", "net.y", "weight", ("x",), 1)
    QuantizeInt8([layer], {"x": RANGE}, weights={"w": RoundedWeight(codes.T, scale)}, corrections={"y": added})(model)
    np.testing.assert_array_equal(model.graph.initializers["w.int8"].const_value.numpy(), codes)
    factor, zero = stored(RANGE)
    q = np.clip(np.rint(x / factor) + zero, 0, 255).astype(np.int64)
    exact = ((q - int(zero)) @ codes.astype(np.int64)) * float(factor) * 0.5 + added
    np.testing.assert_allclose(run(model, {"x": x})[0], exact, rtol=1e-5, atol=1e-4)
    assert [node.op_type for node in model.graph][-1] == "Add"
    with pytest.raises(IsthmusError, match=r"expected \(32, 16\) with \(32,\)"):
        QuantizeInt8([layer], {"x": RANGE}, weights={"w": RoundedWeight(codes, scale)})(model_of(TEXT, {"w": weight}))


def test_weights_are_rounded_as_the_grid_says():
    weight = normal(16, 32)
    weight[:, 3] = 0
    scales = weight_scales(weight, 1)
    assert scales[3] == 1
    np.testing.assert_allclose(np.delete(scales, 3), np.delete(np.abs(weight).max(axis=0), 3) / 127, rtol=1e-6)
    np.testing.assert_array_equal(weight_scales(weight.T, 0), scales)


def test_a_range_that_is_missing_is_named():
    with pytest.raises(IsthmusError, match="no range for x"):
        QuantizeInt8([Layer("y", "net.y", "weight", ("x",), 1)], {})


def test_what_integers_do_not_take_is_left_with_a_reason():
    text = """f (float[b, 16, 4, 4] x, float[b, 16] c, float[b, 2, 4, 16] q) => (float[b, 16, 4, 4] y, float[b, 32] z, float[b, 2, 4, 16] a) {
        first = Conv (x, k) y = Conv (first, k)
        up = MatMul (c, w0) act = Relu (up) down = Gemm <alpha = 2.0> (act, w1) last = Relu (down) z = MatMul (last, w2)
        a = Attention (q, q, q) }"""
    model = model_of(text, {"k": normal(16, 16, 1, 1), "w0": normal(16, 32), "w1": normal(32, 32), "w2": normal(32, 32)})
    layers, excluded = choose(select(model, include=["*"]), model)
    assert [(layer.node, layer.observed) for layer in layers] == [
        ("first", ("x", "first")), ("up", ("c",)), ("z", ("last",))
    ]  # fmt: skip
    reasons = {e.node: e.reason.partition(":")[0] for e in excluded}
    assert reasons == {"y": "a convolution whose result is the model's own", "down": "a Gemm with factors", "a": "attention"}


# Convolutions.

CONVOLUTIONS = """f (float[b, 16, 6, 6] x) => (float[b, 32, 6, 6] z, float[b, 16, 3, 3] y) {
    p = Conv <pads = [1, 1, 1, 1]> (x, k0, b0) r = Relu (p) q = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, k1, b1) y = Sigmoid (q)
    z = Add (r, r) }"""
RANGES = {"x": Interval(-3.0, 3.0), "r": Interval(0.0, 2.5), "q": Interval(-2.0, 2.5)}


def rounded(x, interval):
    scale, zero = stored(interval)
    return ((np.clip(np.rint(x / scale) + zero, 0, 255)) - zero) * float(scale)


def convolved(x, kernel, bias, interval, stride=1):
    """In float64, with weights on their own scales and the bias as ONNX Runtime stores it."""
    factors = weight_scales(kernel, 0).astype(np.float64)
    codes = np.rint(kernel / factors[:, None, None, None].astype(np.float32))
    step = factors * float(stored(interval)[0])
    padded = np.pad(rounded(x, interval), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("ncijhw,ochw->noij", windows, codes * factors[:, None, None, None]) + (np.rint(bias / step) * step)[:, None, None]


def convolutions():
    weights = {"k0": normal(32, 16, 3, 3) / 12, "b0": normal(32) / 4, "k1": normal(16, 32, 3, 3) / 17, "b1": normal(16) / 4}
    model = model_of(CONVOLUTIONS, weights)
    layers, _ = choose(select(model, include=["*"]), model)
    assert [(layer.node, layer.observed) for layer in layers] == [("p", ("x", "r")), ("q", ("r", "q"))]
    QuantizeInt8(layers, RANGES)(model)
    return model, weights


def test_a_convolution_computes_in_integers_with_its_relu(tmp_path):
    model, weights = convolutions()
    assert [node.op_type for node in model.graph] == [
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv", "Relu", "QuantizeLinear", "DequantizeLinear",
        "DequantizeLinear", "Conv", "QuantizeLinear", "DequantizeLinear", "Sigmoid", "Add",
    ]  # fmt: skip
    assert not {"k0", "k1"} & set(model.graph.initializers)
    assert {"b0", "b1"} <= set(model.graph.initializers)
    proto, options = ir.to_proto(model), onnxruntime.SessionOptions()
    onnx.checker.check_model(proto, full_check=True)
    options.optimized_model_filepath = str(tmp_path / "made.onnx")
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "made.onnx").graph.node]
    assert operators.count("QLinearConv") == 2
    assert not {"Conv", "Relu"} & set(operators)
    x = normal(2, 16, 6, 6)
    z, y = session.run(None, {"x": x})
    r = rounded(np.maximum(convolved(x, weights["k0"], weights["b0"], RANGES["x"]), 0), RANGES["r"])
    q = rounded(convolved(r, weights["k1"], weights["b1"], RANGES["r"], stride=2), RANGES["q"])
    # Sums are float32 on one side and integers on the other: where a value lies between two codes, either may be taken.
    steps = {name: float(stored(interval)[0]) for name, interval in RANGES.items()}
    assert np.abs(z - 2 * r).max() <= 2.01 * steps["r"]
    assert np.mean(np.abs(z - 2 * r) > 1e-4) < 0.01
    assert np.abs(y - 1 / (1 + np.exp(-q))).max() <= 2 * steps["q"]
    exact = run(model, {"x": x})
    for a, b in zip((z, y), exact, strict=True):
        assert np.mean(np.abs(a - b) > 1e-4) < 0.02


@pytest.mark.parametrize("relu", [False, True])
def test_a_convolution_whose_result_is_the_models_is_left(relu):
    """ONNX Runtime would convolve in float32 what was rounded to 8 bits, and take longer than without."""
    text = "r = Conv (x, k) y = Relu (r)" if relu else "y = Conv (x, k)"
    model = model_of(f"f (float[b, 16, 4, 4] x) => (float[b, 16, 4, 4] y) {{ {text} }}", {"k": normal(16, 16, 1, 1)})
    layers, excluded = choose(select(model, include=["*"]), model)
    assert not layers
    assert [e.reason for e in excluded] == [
        "a convolution whose result is the model's own: ONNX Runtime convolves in integers where something reads the result in 8 bits"
    ]


def test_the_scales_of_a_kernel_leave_the_bias_its_bits():
    kernel = normal(4, 16, 3, 3)
    kernel[1], kernel[2] = 0, kernel[2] * 1e-12
    bias = np.float32([1, 1, 1, 0])
    scales = kernel_scales(kernel, bias, 0.01)
    np.testing.assert_allclose(scales[[0, 3]], weight_scales(kernel, 0)[[0, 3]])
    assert np.all(np.abs(bias) / (0.01 * scales.astype(np.float64)) < 2**31)
    step = 0.01 * scales[1]
    assert abs(np.rint(1 / step) * step - 1) < 1e-5
    np.testing.assert_array_equal(kernel_scales(kernel, None, 0.01), weight_scales(kernel, 0))


@pytest.mark.parametrize(
    ("interval", "scale", "zero"),
    [(Interval(0.0, 2.55), 0.01, 0), (Interval(-2.55, 0.0), 0.01, 255), (Interval(-1.27, 1.28), 0.01, 127), (Interval(0.0, 0.0), 1.0, 0)],
)
def test_zero_is_a_code(interval, scale, zero):
    found = stored(interval)
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.uint8)
    assert found[0] == pytest.approx(scale)
    assert found[1] == zero
