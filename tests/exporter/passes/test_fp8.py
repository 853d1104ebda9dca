"""The choice of FP8 layers, and QuantizeFp8: the graph before and after, and what it computes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.grids import RoundedWeight
from isthmus.exporter.passes.fp8_layers import select
from isthmus.exporter.passes.quantize_fp8 import E4M3_MAX, SMALLEST_SCALE, QuantizeFp8, scales, weight_scales
from isthmus.exporter.passes.scope import MODULE

RNG = np.random.Generator(np.random.PCG64(0))
STATE = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """The same numbers for a test in whatever order they run."""
    RNG.bit_generator.state = STATE


def model_of(text: str, weights: dict[str, np.ndarray], opset: int = 23) -> ir.Model:
    """A model whose nodes are named, and made for modules that are named, after their first outputs."""
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : {opset}]> {text}')
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


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return (0.1 * RNG.standard_normal(shape)).astype(dtype)


CHAIN = """f (float[b, 4, 16] x, float[b, 16] c) => (float[b, 4, 16] y) {
    first = MatMul (x, w0)  up = MatMul (first, w1)  act = Relu (up)  down = MatMul (act, w2)
    gate = MatMul (c, w3)  one = Constant<value_ints = [1]> ()  wide = Unsqueeze (gate, one)  moved = Mul (down, wide)
    y = MatMul (moved, w4) }"""
WEIGHTS = {"w0": normal(16, 16), "w1": normal(16, 32), "w2": normal(32, 16), "w3": normal(16, 16), "w4": normal(16, 16)}


def test_ends_and_conditioning_are_left_out_by_default():
    found = select(model_of(CHAIN, WEIGHTS))
    assert [(layer.node, layer.module, layer.kind, layer.observed, layer.axis) for layer in found.layers] == [
        ("up", "net.up", "weight", ("first",), 1),
        ("down", "net.down", "weight", ("act",), 1),
    ]
    assert {e.node: (e.reason, e.chosen) for e in found.excluded} == {
        "first": ("first layer", True),
        "gate": ("conditioning: one row a sample", True),
        "y": ("last layer", True),
    }
    assert found.observed() == ("first", "act")


def test_patterns_change_the_choice_and_the_unused_are_told():
    found = select(model_of(CHAIN, WEIGHTS), include=["net.gate", "net.[fy]*", "nowhere"], exclude=["net.y", "*.up"])
    assert [layer.node for layer in found.layers] == ["first", "down", "gate"]
    assert {e.node: e.reason for e in found.excluded} == {"up": "excluded by name", "y": "excluded by name"}
    assert found.unmatched == ("nowhere",)


def test_a_pattern_matches_what_a_module_contains():
    model = model_of(CHAIN, WEIGHTS)
    next(n for n in model.graph if n.name == "up").metadata_props[MODULE] = "blocks.0.mlp.up"
    assert [layer.node for layer in select(model, exclude=["blocks.0"]).layers] == ["down"]


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        ("y = MatMul (x, w)", {"w": normal(16, 24)}, "24 output channels, not a multiple of 16"),
        ("y = MatMul (x, w)", {"w": normal(3, 16, 16)}, "a weight of rank 3"),
        ("y = Conv<group = 2> (x, w)", {"w": normal(16, 8, 1)}, "a convolution of 2 groups"),
        ("y = Gemm<transA = 1> (x2, w)", {"w": normal(3, 16)}, "a transposed activation"),
        ("y = Attention (q, q, q, m)", {}, "attention with a mask"),
        ("y = Attention<is_causal = 1> (q, q, q)", {}, "attention with a mask"),
        ("y = Attention<softcap = 2.0> (q, q, q)", {}, "attention with a soft cap or key and value outputs"),
        ("y = Attention (q, k, k)", {}, "attention of 4 query heads over 2 key heads"),
        ("y = Attention<q_num_heads = 2, kv_num_heads = 2> (x, x, x)", {}, "attention over tensors that are not of the shape"),
        ("y = Attention (r, r, r)", {}, "a head size of 24, not a multiple of 16 up to 256"),
    ],
)
def test_what_fp8_cannot_take_is_not_included_either(text, weights, reason):
    inputs = "float[3, 16, 16] x, float[3, 16] x2, float[3, 4, 5, 16] q, float[3, 2, 5, 16] k, float[3, 4, 5, 24] r, bool[5, 5] m"
    model = model_of(f"f ({inputs}) => (float y) {{ {text} }}", weights)
    found = select(model, include=["*"])
    assert not found.layers
    (left,) = found.excluded
    assert left.reason.startswith(reason)
    assert not left.chosen


def quantized(text: str, weights: dict[str, np.ndarray], ranges: dict[str, float], dtype: str = "float16") -> tuple[ir.Model, QuantizeFp8]:
    """The model, after lowering all of it to a half type by hand, with every layer that can be in FP8."""
    original = model_of(text, weights)
    found = select(original, include=["*"])
    kind = {"float16": "float16", "bfloat16": "bfloat16"}[dtype]
    half = model_of(
        text.replace("float[", f"{kind}["),
        {n: w.astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16) for n, w in weights.items()},
    )
    write = QuantizeFp8(found, ranges, original)
    write(half)
    return half, write


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, feeds)


def rounded(x: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """x as FP8 holds it, in float64."""
    divided = (x.astype(np.float32) / np.float32(scale)).clip(-E4M3_MAX, E4M3_MAX)
    return divided.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_a_linear_layer():
    w = normal(16, 32)
    model, write = quantized("f (float[2, 5, 16] x) => (float[2, 5, 32] y) { y = MatMul (x, w) }", {"w": w}, {"x": 3.0})
    assert kinds(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    assert write.written == [("y", "net.y")]
    q, d, v, _ = model.graph
    assert q.attributes["output_dtype"].as_int() == ir.DataType.FLOAT8E4M3FN
    assert v.attributes["axis"].as_int() == 1
    assert [node.metadata_props[MODULE] for node in (q, d, v)] == ["net.y"] * 3
    stored = v.inputs[0].const_value
    assert stored.dtype == ir.DataType.FLOAT8E4M3FN
    assert set(model.graph.initializers) == {"w.fp8", q.inputs[1].name, v.inputs[1].name}
    x_scale, w_scale = (value.const_value.numpy().astype(np.float64) for value in (q.inputs[1], v.inputs[1]))
    assert x_scale == pytest.approx(3.0 / 448, rel=2**-10)
    np.testing.assert_allclose(w_scale, np.abs(w).max(axis=0) / 448, rtol=2**-10)
    x = RNG.standard_normal((2, 5, 16)).astype(np.float16)
    expected = rounded(x, float(x_scale)) @ rounded(w, w_scale)
    np.testing.assert_allclose(run(model, {"x": x})[0], expected, rtol=2**-9, atol=2e-3)


@pytest.mark.parametrize(
    ("text", "shape", "axis"),
    [
        ("y = Gemm<transB = 1> (x, w)", (32, 16), 0),
        ("y = Gemm (x, w)", (16, 32), 1),
        ("y = Conv (picture, w)", (32, 16, 3, 3), 0),
    ],
)
def test_the_scales_of_a_weight_count_its_output_channels(text, shape, axis):
    w = normal(*shape)
    inputs = "float[5, 16] x, float[5, 16, 6, 6] picture"
    model, _ = quantized(f"f ({inputs}) => (float[5, 32] y) {{ {text} }}", {"w": w}, {"x": 3.0, "picture": 3.0})
    (node,) = (n for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0].is_initializer())
    assert node.attributes["axis"].as_int() == axis
    others = tuple(i for i in range(w.ndim) if i != axis)
    np.testing.assert_allclose(node.inputs[1].const_value.numpy(), np.abs(w).max(axis=others) / 448, rtol=2**-10)


@pytest.mark.parametrize(("text", "axis"), [("y = Gemm<transB = 1> (x, w)", 0), ("y = Gemm (x, w)", 1)])
def test_weights_that_were_rounded_otherwise_are_taken_as_they_are(text, axis):
    w = normal(32, 16) if axis == 0 else normal(16, 32)
    graph = f"f (float[5, 16] x) => (float[5, 32] y) {{ {text} }}"
    original = model_of(graph, {"w": w})
    half = model_of(graph.replace("float[", "float16["), {"w": w.astype(np.float16)})
    codes = RNG.standard_normal((32, 16)).astype(ml_dtypes.float8_e4m3fn)
    scale = weight_scales(w, axis, ir.DataType.FLOAT16)
    QuantizeFp8(select(original, include=["*"]), {"x": 3.0}, original, weights={"w": RoundedWeight(codes, scale)})(half)
    x = RNG.standard_normal((5, 16)).astype(np.float16)
    (x_scale,) = {float(n.inputs[1].const_value.numpy()) for n in half.graph if n.op_type == "QuantizeLinear"}
    expected = rounded(x, x_scale) @ (codes.astype(np.float64) * scale[:, None]).T
    np.testing.assert_allclose(run(half, {"x": x})[0], expected, rtol=2**-9, atol=2e-3)
    for wrong, message in (
        (RoundedWeight(codes[:-1], scale), r"expected \(32, 16\)"),
        (RoundedWeight(codes, scale * 1.0001), "has scales that FLOAT16 does not hold"),
    ):
        again = model_of(graph.replace("float[", "float16["), {"w": w.astype(np.float16)})
        with pytest.raises(IsthmusError, match=message):
            QuantizeFp8(select(original, include=["*"]), {"x": 3.0}, original, weights={"w": wrong})(again)


def test_attention():
    text = "f (float[2, 3, 5, 16] q, float[2, 3, 7, 16] k, float[2, 3, 7, 32] v) => (float[2, 3, 5, 32] y) { y = Attention (q, k, v) }"
    model, write = quantized(text, {}, {"q": 3.0, "k": 2.0, "v": 1.5})
    assert kinds(model) == [
        "Mul", "QuantizeLinear", "DequantizeLinear", "Transpose", "QuantizeLinear", "DequantizeLinear", "MatMul", "Softmax",
        "QuantizeLinear", "DequantizeLinear", "QuantizeLinear", "DequantizeLinear", "MatMul",
    ]  # fmt: skip
    assert write.written == [("y/scores", "net.y"), ("y/values", "net.y")]
    by_input = {n.inputs[0].name: float(n.inputs[1].const_value.numpy()) for n in model.graph if n.op_type == "QuantizeLinear"}
    expected = {"y/scaled": 3.0 / 4 / 448, "k": 2.0 / 448, "y/softmax": 1 / 448, "v": 1.5 / 448}
    assert by_input == {name: pytest.approx(value, rel=2**-9) for name, value in expected.items()}
    assert model.graph.outputs[0].name == "y"
    q, k, v = (RNG.standard_normal(s).astype(np.float16) for s in ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 32)))
    scores = rounded(q * np.float16(0.25), by_input["y/scaled"]) @ rounded(k, by_input["k"]).swapaxes(2, 3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = rounded(weights / weights.sum(-1, keepdims=True), by_input["y/softmax"])
    got = run(model, {"q": q, "k": k, "v": v})[0]
    error = np.abs(got - weights @ rounded(v, by_input["v"]))
    # Weights of the softmax that lie between two numbers of E4M3 may fall to either: a step is at most 2^-4 of the weight, times |v|.
    assert np.median(error) < 1e-3
    assert error.max() < 2**-4 * 1.5


def test_what_two_layers_read_is_quantised_once_and_a_shared_weight_stored_once():
    text = "f (float[2, 16] x, float[2, 16] z) => (float[2, 16] y) { a = MatMul (x, w) b = MatMul (x, v) c = MatMul (z, w) s = Add (a, b) y = Add (s, c) }"
    model, _ = quantized(text, {"w": normal(16, 16), "v": normal(16, 16)}, {"x": 1.0, "z": 1.0})
    assert kinds(model).count("QuantizeLinear") == 2
    assert kinds(model).count("DequantizeLinear") == 4
    assert "w" not in model.graph.initializers
    ir.passes.common.TopologicalSortPass()(model)
    names = [v.name for node in model.graph for v in node.outputs]
    assert len(set(names)) == len(names)


def test_a_weight_that_something_else_reads_stays():
    text = "f (float[2, 16] x) => (float[2, 16] y, float[16, 16] t) { y = MatMul (x, w) t = Transpose<perm = [1, 0]> (w) }"
    model, _ = quantized(text, {"w": normal(16, 16)}, {"x": 1.0})
    assert {"w", "w.fp8"} <= set(model.graph.initializers)


def test_what_stays_in_float32_is_skipped_with_its_module():
    original = model_of("f (float[2, 16] x) => (float[2, 16] y) { y = MatMul (x, w) }", {"w": normal(16, 16)})
    write = QuantizeFp8(select(original, include=["*"]), {"x": 1.0}, original)
    copy = original.clone()
    assert not write(copy).modified
    assert [e.module for e in write.skipped] == ["net.y"]
    assert kinds(copy) == ["MatMul"]


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_missing_range_is_named(value):
    model = model_of("f (float[2, 16] x) => (float[2, 16] y) { y = MatMul (x, w) }", {"w": normal(16, 16)})
    with pytest.raises(IsthmusError, match="no finite range for x"):
        QuantizeFp8(select(model, include=["*"]), {} if value is None else {"x": value}, model)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_scales_are_rounded_upwards_to_what_the_type_holds(dtype):
    largest = np.exp(RNG.uniform(-2, 10, 1000))
    found = scales(largest, dtype)
    assert (found * E4M3_MAX >= largest).all()
    assert (found * E4M3_MAX <= largest * (1 + (2**-10 if dtype == ir.DataType.FLOAT16 else 2**-7))).all()
    assert (found.astype(dtype.numpy()).astype(np.float64) == found).all()
    assert scales(np.array([0.0, 1e-30]), dtype).tolist() == [1.0, SMALLEST_SCALE]


def test_it_works_in_bfloat16():
    model, _ = quantized("f (float[2, 16] x) => (float[2, 16] y) { y = MatMul (x, w) }", {"w": normal(16, 16)}, {"x": 1.0}, "bfloat16")
    types = {v.dtype for node in model.graph for v in (*node.inputs, *node.outputs)}
    assert types == {ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN}
