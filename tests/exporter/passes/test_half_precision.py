"""ToHalf: the graph before and after, and each rule that keeps a node in float32."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from isthmus.exporter.ops.onnx_forms import add_functions, custom_nodes
from isthmus.exporter.passes.half_precision import PRECISION, ToHalf
from isthmus.exporter.passes.infer_shapes import InferShapes
from isthmus.exporter.passes.widen_bfloat16 import WidenBfloat16

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\n'


def parse(body: str, **weights: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(HEADER + body)
    for name, array in weights.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        assert value.producer() is None
        if value in model.graph.inputs:
            model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    for node in model.graph:
        for value in node.outputs:
            value.dtype = value.dtype or ir.DataType.FLOAT
    return model


def run(model: ir.Model, *inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True)))[0]


def single(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph if n.metadata_props.get(PRECISION) == "float32"]


def listing(model: ir.Model) -> list[tuple[str, list[str | None], list[str | None]]]:
    return [(n.op_type, [v.name if v else None for v in n.inputs], [v.name for v in n.outputs]) for n in model.graph]


def test_given_and_result() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 8), dtype=np.float32)
    model = parse("g (float[4,8] x, float[8,8] w) => (float[4,8] y) { h = MatMul(x, w)\n y = Softmax<axis=-1>(h) }", w=w)
    before = model.clone()

    ToHalf()(model)

    assert listing(model) == [
        ("Cast", ["x"], ["x.f16"]),
        ("MatMul", ["x.f16", "w"], ["h"]),
        ("Cast", ["h"], ["h.f32"]),
        ("Softmax", ["h.f32"], ["y"]),
    ]
    assert model.graph.initializers["w"].const_value.dtype == ir.DataType.FLOAT16
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [ir.DataType.FLOAT] * 2
    x = rng.standard_normal((4, 8), dtype=np.float32)
    np.testing.assert_allclose(run(model, x), run(before, x), atol=2e-3)


def test_an_output_computed_in_float16_keeps_its_name_and_type() -> None:
    model = parse("g (float[4,8] x, float[4,8] b) => (float[4,8] y) { y = Add(x, b) }")
    ToHalf()(model)
    assert listing(model)[-1] == ("Cast", ["y.f16"], ["y"])
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
    ones = np.ones((4, 8), np.float32)
    np.testing.assert_array_equal(run(model, ones, ones), 2 * ones)


def test_an_epsilon_that_float16_would_lose_stays() -> None:
    eps = np.array(1e-15, np.float32)
    model = parse("g (float[4,8] x, float[4,8] z, float e) => (float[4,8] y) { n = Relu(z)\n d = Add(n, e)\n y = Div(x, d) }", e=eps)
    ToHalf()(model)
    assert {"Add", "Div"} <= set(single(model))
    zero = np.zeros((4, 8), np.float32)
    np.testing.assert_array_equal(run(model, zero, zero), zero)  # 0 / (0 + 0) would be NaN


def test_the_angle_of_a_timestep_embedding_is_computed_in_float32() -> None:
    freqs = np.exp(-np.linspace(0, 9, 16, dtype=np.float32))[None]
    model = parse("g (float[4,1] t, float[1,16] f) => (float[4,16] y) { a = Mul(t, f)\n y = Cos(a) }", f=freqs)
    before = model.clone()
    ToHalf()(model)
    assert single(model) == ["Mul", "Cos"]
    t = np.array([[999.7], [3.3], [512.1], [0.01]], np.float32)
    np.testing.assert_array_equal(run(model, t), run(before, t))


def test_the_product_that_an_argmin_chooses_from_is_computed_in_float32() -> None:
    w = np.ones((8, 8), np.float32)
    model = parse(
        "g (float[4,8] x, float[8,8] w) => (int64[4] y) { h = MatMul(x, w)\n t = Tanh(h)\n s = Neg(t)\n d = MatMul(s, w)\n e = Add(d, d)\n "
        "y = ArgMin<axis=-1, keepdims=0>(e) }",
        w=w,
    )
    model.graph[-1].outputs[0].dtype = ir.DataType.INT64
    ToHalf()(model)
    assert single(model) == ["Neg", "MatMul", "Add", "ArgMin"]


def test_floats_of_integers_stay_exact() -> None:
    third = np.array(1 / 3, np.float32)
    model = parse("g (int64[4] i, float third) => (float[4] y) { f = Cast<to=1>(i)\n y = Mul(f, third) }", third=third)
    ToHalf()(model)
    assert single(model) == ["Cast", "Mul"]
    np.testing.assert_array_equal(run(model, np.arange(4)), np.arange(4, dtype=np.float32) * third)


def test_linear_attention_divides_before_it_leaves_float32() -> None:
    model = parse(
        "g (float[1,64,16] q, float[1,16,64] k, float[1,64,16] v, float[1,64,1] o) => (float[1,64,16] y) "
        "{ kv = MatMul(k, v)\n n = MatMul(q, kv)\n s = MatMul(k, o)\n d = MatMul(q, s)\n y = Div(n, d) }"
    )
    before = model.clone()
    ToHalf()(model)
    assert single(model) == ["MatMul", "MatMul", "MatMul", "MatMul", "Div"]
    rng = np.random.default_rng(0)
    q, k, v = (60 * rng.random(s, dtype=np.float32) for s in ((1, 64, 16), (1, 16, 64), (1, 64, 16)))
    inputs = (q, k, v, np.ones((1, 64, 1), np.float32))
    products = q @ (k @ v)
    assert products.max() > 65504  # beyond float16, so a float16 product would be infinite
    np.testing.assert_allclose(run(model, *inputs), run(before, *inputs), rtol=1e-5)


def test_a_product_with_a_weight_is_float16_even_before_a_division() -> None:
    w = np.eye(8, dtype=np.float32)
    model = parse("g (float[4,8] x, float[4,8] z, float[8,8] w) => (float[4,8] y) { h = MatMul(x, w)\n y = Div(h, z) }", w=w)
    ToHalf()(model)
    assert single(model) == ["Div"]


def test_the_state_of_a_scan_stays_in_float32_until_its_product() -> None:
    w = np.eye(8, dtype=np.float32)
    model = parse(
        "g (float[4,8] a, float[4,8] x, float[8,8] w) => (float[4,8] y) { e = Exp(a)\n h = Mul(e, x)\n s = Add(h, x)\n y = MatMul(s, w) }",
        w=w,
    )
    ToHalf()(model)
    assert single(model) == ["Exp", "Mul", "Add"]


@pytest.mark.parametrize("keep", [True, False])
def test_a_module_that_overflows_is_kept(keep: bool) -> None:
    model = parse("g (float[4,8] x, float[4,8] z) => (float[4,8] y) { h = Mul(x, x)\n y = Sub(h, z) }")
    next(iter(model.graph)).metadata_props["isthmus.module"] = "blocks.0.mlp"
    ToHalf(keep_modules=["blocks.0.mlp"] if keep else [])(model)
    assert single(model) == (["Mul"] if keep else [])


def test_a_weight_beyond_float16_stays_and_is_not_stored_as_infinity() -> None:
    w = np.full((8, 8), 1e5, np.float32)
    model = parse("g (float[4,8] x, float[8,8] w) => (float[4,8] y) { y = MatMul(x, w) }", w=w)
    ToHalf()(model)
    assert single(model) == ["MatMul"]
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), w)


def test_a_weight_used_in_both_precisions_is_kept_in_both() -> None:
    w = np.arange(8, dtype=np.float32)
    model = parse("g (float[4,8] x, float[8] w) => (float[4,8] y, float[8] z) { y = Add(x, w)\n z = Exp(w) }", w=w)
    ToHalf()(model)
    assert {name: v.const_value.dtype for name, v in model.graph.initializers.items()} == {
        "w": ir.DataType.FLOAT,
        "w.float16": ir.DataType.FLOAT16,
    }


def test_resize_keeps_its_scales_in_float32() -> None:
    scales = np.array([1, 1, 2, 2], np.float32)
    model = parse('g (float[1,2,4,4] x, float[4] s) => (float[1,2,8,8] y) { y = Resize<mode="nearest">(x, , s) }', s=scales)
    before = model.clone()
    ToHalf()(model)
    assert model.graph.initializers["s"].const_value.dtype == ir.DataType.FLOAT
    x = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
    np.testing.assert_array_equal(run(model, x), run(before, x))


def test_a_node_of_ours_takes_float16_activations_and_keeps_float32_states() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 8), dtype=np.float32) / 3
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23, "isthmus" : 1]>
        g (float[2,5,8] x, float[8,8] w, float[2,2,4,4] s) => (float[2,5,8] y, float[2,2,4,4] l) {
            q = MatMul(x, w)
            h, l = isthmus.PlainLinearAttention <q_num_heads: int = 2, kv_num_heads: int = 2, scale: float = 0.5> (q, q, q, s)
            y = MatMul(h, w)
        }"""
    )
    weight = model.graph.inputs.pop(1)
    weight.const_value = ir.tensor(w, name="w")
    model.graph.register_initializer(weight)
    for node in model.graph:
        for value in node.outputs:
            value.dtype = ir.DataType.FLOAT
    add_functions(model)
    inputs = [rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 5, 8), (2, 2, 4, 4))]
    before = run(model, *inputs)
    ToHalf()(model)
    assert [n.op_type for n in model.graph] == ["Cast", "MatMul", "PlainLinearAttention", "MatMul", "Cast"]
    (node,) = custom_nodes(model)
    assert [v.dtype for v in (*node.inputs, *node.outputs) if v is not None] == [
        *[ir.DataType.FLOAT16] * 3,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.FLOAT,
    ]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_allclose(run(model, *inputs), before, atol=2e-2)


def test_a_node_of_ours_stays_in_float32_where_its_module_leaves_the_range() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23, "isthmus" : 1]> g (float[2,5,8] q) => (float[2,5,8] y) {
            y = isthmus.NormalizedLinearAttention <num_heads: int = 2, eps: float = 1e-15> (q, q, q)
        }"""
    )
    model.graph[0].metadata_props["isthmus.module"] = "blocks.1"
    ToHalf(keep_modules=["blocks.1"])(model)
    assert [n.op_type for n in model.graph] == ["NormalizedLinearAttention"]
    assert single(model) == ["NormalizedLinearAttention"]


def test_bfloat16_graph_before_and_after() -> None:
    model = _parse_bf16("f (float[2, 4] x) => (float[2, 4] y) { h = MatMul (x, w) y = Softmax (h) }")
    ToHalf(dtype=ir.DataType.BFLOAT16)(model)
    assert [n.op_type for n in model.graph] == ["Cast", "MatMul", "Cast", "Softmax"]
    assert model.graph.initializers["w"].dtype == ir.DataType.BFLOAT16
    matmul, softmax = model.graph[1], model.graph[3]
    assert matmul.outputs[0].dtype == ir.DataType.BFLOAT16
    assert softmax.outputs[0].dtype == ir.DataType.FLOAT


def test_bfloat16_holds_what_float16_does_not() -> None:
    text = "f (float[2, 4] x) => (float[2, 4] y) { h = MatMul (x, w) y = Add (h, e) }"
    counts = []
    for dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        model = _parse_bf16(text, e=np.array(1e6, np.float32))
        ToHalf(dtype=dtype)(model)
        counts.append(sum(n.metadata_props.get(PRECISION) == "float32" for n in model.graph))
    assert counts == [1, 0]


def test_widened_bfloat16_computes_the_rounded_values() -> None:
    model = _parse_bf16("f (float[2, 4] x) => (float[2, 4] y) { h = MatMul (x, w) y = Add (h, x) }")
    ToHalf(dtype=ir.DataType.BFLOAT16)(model)
    before = [n.op_type for n in model.graph]
    assert WidenBfloat16()(model).modified
    assert before == ["Cast", "MatMul", "Add", "Cast"]
    after = ["Cast", "Cast", "Cast", "MatMul", "Cast", "Cast", "Add", "Cast", "Cast"]
    assert [n.op_type for n in model.graph] == after
    assert not WidenBfloat16()(model).modified
    x = np.random.Generator(np.random.PCG64(0)).standard_normal((2, 4), dtype=np.float32)
    w = model.graph.initializers["w"].const_value.numpy().astype(np.float32)
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    product = (rounded @ w).astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = (product + rounded).astype(ml_dtypes.bfloat16).astype(np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)


def _parse_bf16(text: str, **more: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    generator = np.random.Generator(np.random.PCG64(1))
    for name, array in {"w": generator.standard_normal((4, 4), dtype=np.float32), **more}.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name) if name in text else None
        if value is not None:
            value.const_value = ir.tensor(array, name=name)
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
            model.graph.register_initializer(value)
    InferShapes()(model)
    return model
