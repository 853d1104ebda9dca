"""QuantizeInt4: the graph before and after, and what it computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.grids import RoundedWeight
from isthmus.exporter.passes.fp8_layers import Layer
from isthmus.exporter.passes.quantize_int4 import QuantizeInt4, choose, nearest, weight_scales
from isthmus.exporter.passes.scope import MODULE


def normal(*shape, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32)


def model_of(text, weights):
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


def run(model, inputs):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, inputs)


def read_back(weight, block):
    """(inputs, outputs) what is stored of a weight, block by block, in float64."""
    found = np.empty(weight.shape)
    for start in range(0, len(weight), block):
        for column in range(weight.shape[1]):
            part = weight[start : start + block, column].astype(np.float64)
            exact = np.abs(part).max() / 7
            scale = np.float16(exact)
            if float(scale) < exact:
                scale = np.nextafter(scale, np.float16(np.inf))
            found[start : start + block, column] = np.clip(np.rint(part / float(scale)), -7, 7) * float(scale)
    return found


GRAPH = "g (float[n,5,64] x) => (float[n,5,48] y) { p = MatMul (x, w)  q = Add (p, b)  y = Relu (q) }"


@pytest.mark.parametrize("block", [32, 64])
def test_a_product_with_a_bias_behind_it(block):
    weight, bias, x = normal(64, 48), normal(48, seed=1), normal(2, 5, 64, seed=2)
    model = model_of(GRAPH, {"w": weight, "b": bias})
    layer = Layer("p", "net.p", "weight", ("x",), axis=1, block=block)
    write = QuantizeInt4([layer], model.clone())
    assert write(model).modified
    assert write.written == [("p", "net.p")]
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul", "Add", "Relu"]
    assert {name: v.dtype for name, v in model.graph.initializers.items()} == {
        "b": ir.DataType.FLOAT, "w.int4": ir.DataType.INT4, "w.scale": ir.DataType.FLOAT
    }  # fmt: skip
    (got,) = run(model, {"x": x})
    np.testing.assert_allclose(got, np.maximum(x @ read_back(weight, block) + bias, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_becomes_a_product_and_a_sum_with_the_correction_in_it(transposed):
    weight, bias, added, x = normal(64, 32), normal(32, seed=1), normal(32, seed=3), normal(3, 64, seed=2)
    text = f"g (float[n,64] x) => (float[n,32] y) {{ y = Gemm <transB = {transposed}> (x, w, b) }}"
    model = model_of(text, {"w": weight.T.copy() if transposed else weight, "b": bias})
    layer = Layer("y", "net.y", "weight", ("x",), axis=0 if transposed else 1, block=32)
    QuantizeInt4([layer], model.clone(), corrections={"y": added})(model)
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul", "Add"]
    assert model.graph.initializers["w.scale"].shape == [2, 32]
    assert "b" not in model.graph.initializers
    (got,) = run(model, {"x": x})
    np.testing.assert_allclose(got, x @ read_back(weight, 32) + bias + added, rtol=1e-5, atol=1e-5)


def test_codes_that_are_given_are_stored():
    weight, x = normal(64, 48), normal(2, 5, 64, seed=2)
    scale = weight_scales(weight, 1, 32)
    assert scale.shape == (48, 2)
    codes = np.clip(nearest(weight, scale, 1) + 1, -7, 7)
    rounded = RoundedWeight(codes, scale)
    model = model_of(GRAPH, {"w": weight, "b": np.zeros(48, np.float32)})
    layer = Layer("p", "net.p", "weight", ("x",), axis=1, block=32)
    QuantizeInt4([layer], model.clone(), weights={"w": rounded})(model)
    (got,) = run(model, {"x": x})
    np.testing.assert_allclose(got, np.maximum(x @ rounded.read().T, 0), rtol=1e-5, atol=1e-5)
    with pytest.raises(IsthmusError, match="expected"):
        QuantizeInt4([layer], model, weights={"w": RoundedWeight(codes[:, :40], scale)})(model_of(GRAPH, {"w": weight, "b": scale[:, 0]}))


def test_scales_are_numbers_of_float16_and_nothing_saturates():
    weight = normal(64, 48) * np.float32(10.0) ** np.arange(-24, 24, dtype=np.float32)
    weight[:32, 40] = 0
    weight = np.clip(weight, -1e5, 1e5)
    scale = weight_scales(weight, 1, 32)
    np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
    assert np.all(np.isfinite(scale))
    assert np.all(scale > 0)
    largest = np.abs(weight.T.reshape(48, 2, 32)).max(axis=2)
    assert np.all(largest <= scale * 7 * (1 + 1e-6))
    assert scale[40, 0] == 1


def test_another_type_is_left_alone():
    model = model_of(GRAPH, {"w": normal(64, 48), "b": normal(48)})
    write = QuantizeInt4([Layer("p", "net.p", "weight", ("x",), axis=1, block=32)], model.clone(), dtype=ir.DataType.FLOAT16)
    assert not write(model).modified
    assert [e.module for e in write.skipped] == ["net.p"]


def test_what_is_chosen():
    text = """g (float[n,5,64] x, float[n,3,6,6] i) => (float[n,5,20] y, float[n,32,4,4] c) {
        a = MatMul (x, w1)  b = MatMul (a, w2)  d = MatMul (b, w3)  y = MatMul (d, w4)  c0 = Conv (i, k0)  c = Conv (c0, k) }"""
    weights = {"w1": normal(64, 64), "w2": normal(64, 40), "w3": normal(40, 64), "w4": normal(64, 20)}
    model = model_of(text, {**weights, "k0": normal(32, 3, 1, 1), "k": normal(32, 32, 3, 3)})
    found = choose(model, 32, include=["net.c", "net.y"])
    assert [(layer.node, layer.axis, layer.block, layer.observed) for layer in found.layers] == [
        ("b", 1, 32, ("a",)), ("y", 1, 32, ("d",))
    ]  # fmt: skip
    assert {e.module: e.reason for e in found.excluded} == {
        "net.a": "first layer",
        "net.c0": "first layer",
        "net.d": "40 input channels, no multiple of the block of 32",
        "net.c": "a convolution: weights in 4 bits are read by matrix products alone",
    }
