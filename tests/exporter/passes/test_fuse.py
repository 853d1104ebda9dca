"""The fusions: hand-written normalisations, GELUs and attention."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from isthmus.exporter.passes.expand_attention_mask import ExpandAttentionMask
from isthmus.exporter.passes.fuse_attention import FuseAttention
from isthmus.exporter.passes.fuse_gelu import FuseGelu
from isthmus.exporter.passes.fuse_layer_normalization import FuseLayerNormalization
from isthmus.exporter.passes.fuse_rms_normalization import FuseRMSNormalization

DEAD = RemoveUnusedNodesPass()
WEIGHT = "float[8] weight = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8}"
ONES = "float[8] one_scale = {1, 1, 1, 1, 1, 1, 1, 1}"
NORM = f"<{WEIGHT}, float two = {{2}}, int64[1] last = {{-1}}, float eps = {{1e-15}}, float one = {{1}}, float minus_half = {{-0.5}}>"

SQUARES = {"pow": "square = Pow(x, two)", "mul": "square = Mul(x, x)"}
DIVISIONS = {
    "reciprocal": "root = Sqrt(biased) inverse = Reciprocal(root) n = Mul(x, inverse)",
    "one over": "root = Sqrt(biased) inverse = Div(one, root) n = Mul(inverse, x)",
    "div": "root = Sqrt(biased) n = Div(x, root)",
    "pow": "inverse = Pow(biased, minus_half) n = Mul(x, inverse)",
}


def rms(
    square: str = "pow", division: str = "reciprocal", tail: str = "y = Mul(n, weight)", mean: str = "<keepdims=1>(square, last)"
) -> str:
    return f"""f (float[batch, 5, 8] x) => (float[batch, 5, 8] y) {NORM} {{
        {SQUARES[square]}
        mean = ReduceMean{mean}
        biased = Add(mean, eps)
        {DIVISIONS[division]}
        {tail}
    }}"""


RMS_RESULT = f"""f (float[batch, 5, 8] x) => (float[batch, 5, 8] y) <{WEIGHT}> {{
    y = RMSNormalization<axis=-1, epsilon=1e-15, stash_type=1>(x, weight)
}}"""


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("square", SQUARES)
def test_rms_normalization(rewrites, square: str, division: str) -> None:
    rewrites(FuseRMSNormalization(), rms(square, division), RMS_RESULT, then=DEAD, atol=1e-6)


def test_rms_normalization_takes_the_weight_from_either_side(rewrites) -> None:
    rewrites(FuseRMSNormalization(), rms(tail="y = Mul(weight, n)"), RMS_RESULT, then=DEAD, atol=1e-6)


def test_rms_normalization_without_weight_gets_ones(rewrites) -> None:
    result = RMS_RESULT.replace(WEIGHT, ONES).replace("weight)", "one_scale)")
    rewrites(
        FuseRMSNormalization(),
        rms(tail="y = Mul(n, one)"),
        result.replace("y = RMS", "n = RMS").replace("one_scale)", "one_scale) y = Mul(n, one)").replace(ONES, ONES + ", float one = {1}"),
        then=DEAD,
        atol=1e-6,
    )


def test_rms_normalization_keeps_the_epsilon_bit_for_bit(parse) -> None:
    model = parse(rms().replace("1e-15", "1e-8"))
    FuseRMSNormalization()(model)
    (node,) = [n for n in model.graph if n.op_type == "RMSNormalization"]
    assert np.float32(node.attributes["epsilon"].as_float()) == np.float32(1e-8)


def test_rms_normalization_takes_in_the_casts_of_half_precision(parse, outputs) -> None:
    text = f"""f (float16[2, 8] h, float16[8] weight) => (float16[2, 8] y) <float two = {{2}}, int64[1] last = {{-1}}, float eps = {{1e-6}}> {{
        x = Cast<to=1>(h)
        square = Pow(x, two)
        mean = ReduceMean<keepdims=1>(square, last)
        biased = Add(mean, eps)
        {DIVISIONS["reciprocal"]}
        back = Cast<to=10>(n)
        y = Mul(back, weight)
    }}"""
    model = parse(text)
    assert FuseRMSNormalization()(model).modified
    DEAD(model)
    assert [node.op_type for node in model.graph] == ["RMSNormalization"]
    assert model.graph[0].inputs[0].name == "h"
    want = outputs(parse(text), 0)[0].astype(np.float32)
    np.testing.assert_allclose(outputs(model, 0)[0].astype(np.float32), want, rtol=2e-3, atol=1e-4)  # 2 ulp of float16


@pytest.mark.parametrize(
    "given",
    [
        rms(mean="<keepdims=1>(square, first)").replace("float eps", "int64[1] first = {1}, float eps"),  # not the last axis
        rms(mean="<keepdims=0>(x, last) other = ReduceMean<keepdims=1>(x, last)").replace(
            "biased = Add(mean", "biased = Add(other"
        ),  # mean of x
        rms().replace("Pow(x, two)", "Pow(x, one)"),  # not a square
        rms().replace("n = Mul(x, inverse)", "z = Neg(x) n = Mul(z, inverse)"),  # the square of another value
        rms().replace("float[batch, 5, 8]", "double[batch, 5, 8]").replace("float ", "double ").replace("float[8]", "double[8]"),  # float64
    ],
    ids=["axis", "no square in the mean", "power", "another x", "float64"],
)
def test_rms_normalization_leaves_near_misses(leaves, given: str) -> None:
    leaves(FuseRMSNormalization(), given)


@pytest.mark.parametrize("opset", [20, 22])
def test_rms_normalization_needs_opset_23(leaves, opset: int) -> None:
    leaves(FuseRMSNormalization(), rms(), opset=opset)


def layer_norm(
    tail: str = "scaled = Mul(n, weight) y = Add(scaled, weight)", square: str = "Mul(centred, centred)", division: str = "div"
) -> str:
    return f"""f (float[batch, 5, 8] input) => (float[batch, 5, 8] y) {NORM} {{
        average = ReduceMean<keepdims=1>(input, last)
        centred = Sub(input, average)
        square = {square}
        mean = ReduceMean<keepdims=1>(square, last)
        biased = Add(mean, eps)
        {DIVISIONS[division].replace("x", "centred")}
        {tail}
    }}""".replace("1e-15", "1e-6")


def layer_norm_result(inputs: str) -> str:
    return f"""f (float[batch, 5, 8] input) => (float[batch, 5, 8] y) <{WEIGHT}, {ONES}> {{
        y = LayerNormalization<axis=-1, epsilon=1e-6, stash_type=1>({inputs})
    }}"""


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("square", ["Mul(centred, centred)", "Pow(centred, two)"])
def test_layer_normalization(rewrites, square: str, division: str, opset: int) -> None:
    given = layer_norm(square=square, division=division)
    rewrites(FuseLayerNormalization(), given, layer_norm_result("input, weight, weight"), then=DEAD, atol=2e-6, opset=opset)


@pytest.mark.parametrize(
    ("tail", "inputs"),
    [("y = Mul(n, weight)", "input, weight"), ("y = Add(n, weight)", "input, one_scale, weight")],
)
def test_layer_normalization_with_weight_or_bias_only(rewrites, tail: str, inputs: str) -> None:
    rewrites(FuseLayerNormalization(), layer_norm(tail), layer_norm_result(inputs), then=DEAD, atol=2e-6)


def test_layer_normalization_leaves_an_adaptive_scale_outside(rewrites) -> None:
    given = layer_norm("y = Mul(n, scale)").replace("(float[batch, 5, 8] input)", "(float[batch, 5, 8] input, float[batch, 1, 8] scale)")
    result = f"""f (float[batch, 5, 8] input, float[batch, 1, 8] scale) => (float[batch, 5, 8] y) <{ONES}> {{
        n = LayerNormalization<axis=-1, epsilon=1e-6, stash_type=1>(input, one_scale)
        y = Mul(n, scale)
    }}"""
    rewrites(FuseLayerNormalization(), given, result, then=DEAD, atol=2e-6)


@pytest.mark.parametrize(
    "given",
    [
        layer_norm(square="Mul(centred, input)"),
        layer_norm().replace("Sub(input, average)", "Sub(average, input)"),
        layer_norm()
        .replace("ReduceMean<keepdims=1>(input, last)", "ReduceMean<keepdims=1>(input, first)")
        .replace("float eps", "int64[1] first = {1}, float eps"),
        layer_norm().replace("mean = ReduceMean", "mean = ReduceSum"),
    ],
    ids=["another square", "negated", "two axes", "sum"],
)
def test_layer_normalization_leaves_near_misses(leaves, given: str) -> None:
    leaves(FuseLayerNormalization(), given)


GELU_CONSTANTS = f"""<float half = {{0.5}}, float one = {{1}}, float two = {{2}}, float three = {{3}}, float root = {{{math.sqrt(2):.9g}}}, float inverse = {{{math.sqrt(0.5):.9g}}},
    float a = {{0.044715}}, float b = {{{math.sqrt(2 / math.pi):.9g}}}, float near = {{1.702}}>"""


def gelu(body: str) -> str:
    return f"f (float[2, 8] x) => (float[2, 8] y) {GELU_CONSTANTS} {{ {body} }}"


@pytest.mark.parametrize(
    "body",
    [
        "h = Mul(x, half) s = Div(x, root) e = Erf(s) p = Add(e, one) y = Mul(h, p)",
        "s = Mul(inverse, x) e = Erf(s) p = Add(one, e) q = Mul(x, p) y = Mul(q, half)",
        "s = Div(x, root) e = Erf(s) p = Add(e, one) q = Mul(x, p) y = Div(q, two)",
        "s = Div(x, root) e = Erf(s) p = Add(e, one) q = Mul(half, p) y = Mul(x, q)",
    ],
)
@pytest.mark.parametrize("opset", [20, 23])
def test_gelu_by_erf(rewrites, body: str, opset: int) -> None:
    rewrites(FuseGelu(), gelu(body), gelu('y = Gelu<approximate="none">(x)'), then=DEAD, atol=1e-6, opset=opset)


@pytest.mark.parametrize(
    "body",
    [
        "h = Mul(x, half) c = Pow(x, three) d = Mul(c, a) e = Add(x, d) g = Mul(e, b) t = Tanh(g) p = Add(t, one) y = Mul(h, p)",
        "q = Mul(x, x) c = Mul(q, x) d = Mul(a, c) e = Add(d, x) g = Mul(b, e) t = Tanh(g) p = Add(one, t) r = Mul(p, x) y = Mul(half, r)",
        "q = Mul(x, x) d = Mul(a, q) e = Add(one, d) m = Mul(b, x) g = Mul(m, e) t = Tanh(g) p = Add(one, t) h = Mul(half, x) y = Mul(h, p)",
    ],
)
def test_gelu_by_tanh(rewrites, body: str) -> None:
    rewrites(FuseGelu(), gelu(body), gelu('y = Gelu<approximate="tanh">(x)'), then=DEAD, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        "h = Mul(x, half) s = Mul(x, root) e = Erf(s) p = Add(e, one) y = Mul(h, p)",
        "h = Mul(x, half) s = Div(x, root) e = Erf(s) p = Add(e, half) y = Mul(h, p)",
        "h = Mul(x, two) s = Div(x, root) e = Erf(s) p = Add(e, one) y = Mul(h, p)",
        "m = Mul(x, near) s = Sigmoid(m) y = Mul(x, s)",
        "z = Neg(x) h = Mul(z, half) s = Div(x, root) e = Erf(s) p = Add(e, one) y = Mul(h, p)",
        "h = Mul(x, half) c = Pow(x, two) d = Mul(c, a) e = Add(x, d) g = Mul(e, b) t = Tanh(g) p = Add(t, one) y = Mul(h, p)",
    ],
    ids=["times root", "plus half", "times two", "quick gelu", "another x", "square"],
)
def test_gelu_leaves_near_misses(leaves, body: str) -> None:
    leaves(FuseGelu(), gelu(body))


QKV = "float[b, 2, 5, 4] q, float[b, 2, 7, 4] k, float[b, 2, 7, 6] v"


def attention(
    scores: str, *, inputs: str = QKV, out: str = "float[b, 2, 5, 6] y", turn: str = "t = Transpose<perm=[0, 1, 3, 2]>(k)", axis: int = -1
) -> str:
    return f"""f ({inputs}) => ({out}) <float c = {{0.5}}, float two = {{2}}, float negative = {{-0.5}}> {{
        {turn}
        {scores}
        w = Softmax<axis={axis}>(s)
        y = MatMul(w, v)
    }}"""


def attention_result(call: str, *, inputs: str = QKV, before: str = "") -> str:
    return f"f ({inputs}) => (float[b, 2, 5, 6] y) {{ {before} y = Attention{call} }}"


@pytest.mark.parametrize(
    "scores",
    [
        "p = MatMul(q, t) s = Mul(p, c)",
        "p = MatMul(q, t) s = Div(p, two)",
        "r = Mul(q, c) s = MatMul(r, t)",
        "r = Mul(c, t) s = MatMul(q, r)",
    ],
)
def test_attention(rewrites, scores: str) -> None:
    rewrites(FuseAttention(), attention(scores), attention_result("<scale=0.5>(q, k, v)"), then=DEAD, atol=2e-6)


def test_attention_without_scale_and_with_a_scale_below_the_transposition(rewrites) -> None:
    rewrites(FuseAttention(), attention("s = MatMul(q, t)"), attention_result("<scale=1.0>(q, k, v)"), then=DEAD, atol=2e-6)
    turn = "r = Mul(k, c) t = Transpose<perm=[0, 1, 3, 2]>(r)"
    rewrites(FuseAttention(), attention("s = MatMul(q, t)", turn=turn), attention_result("<scale=0.5>(q, k, v)"), then=DEAD, atol=2e-6)


def test_attention_turns_a_key_that_comes_in_another_layout(rewrites) -> None:
    inputs = QKV.replace("[b, 2, 7, 4] k", "[b, 7, 2, 4] k")
    given = attention("p = MatMul(q, t) s = Mul(p, c)", inputs=inputs, turn="t = Transpose<perm=[0, 2, 3, 1]>(k)")
    result = attention_result("<scale=0.5>(q, turned, v)", inputs=inputs, before="turned = Transpose<perm=[0, 2, 1, 3]>(k)")
    rewrites(FuseAttention(), given, result, then=DEAD, atol=2e-6)


@pytest.mark.parametrize("mask", ["[5, 7]", "[1, 1, 5, 7]", "[b, 1, 5, 7]", "[b, 2, 5, 7]"])
def test_attention_takes_in_an_added_mask(rewrites, mask: str) -> None:
    inputs = f"{QKV}, float{mask} mask"
    given = attention("p = MatMul(q, t) r = Mul(p, c) s = Add(r, mask)", inputs=inputs)
    rewrites(FuseAttention(), given, attention_result("<scale=0.5>(q, k, v, mask)", inputs=inputs), then=DEAD, atol=2e-6)


@pytest.mark.parametrize(
    "given",
    [
        attention("p = MatMul(q, t) s = Mul(p, negative)"),
        attention("p = MatMul(q, t) s = Mul(p, c)", axis=2),
        attention("p = MatMul(q, t) s = Mul(p, c)", inputs=QKV.replace("[b, 2, 7, 6] v", "[1, 2, 7, 6] v")),
        attention("p = MatMul(q, t) s = Mul(p, c)", out="float[b, 2, 5, 6] y, float[b, 2, 5, 7] w"),
        attention("p = MatMul(q, t) r = Mul(p, c) s = Add(r, mask)", inputs=f"{QKV}, float[b, 1, 1, 7] mask"),
        attention("p = MatMul(q, t) r = Add(p, mask) s = Mul(r, c)", inputs=f"{QKV}, float[5, 7] mask"),
    ],
    ids=["negative scale", "axis", "v broadcasts", "weights are an output", "mask broadcasts over queries", "mask before scale"],
)
def test_attention_leaves_near_misses(leaves, given: str) -> None:
    leaves(FuseAttention(), given)


def test_attention_needs_opset_23(leaves) -> None:
    leaves(FuseAttention(), attention("p = MatMul(q, t) s = Mul(p, c)"), opset=22)


def masked(mask: str, length: str = "5") -> str:
    return f"f ({QKV.replace('2, 5, 4] q', f'2, {length}, 4] q')}, float{mask} mask) => (float[b, 2, {length}, 6] y)"


def test_attention_mask_is_expanded_to_the_length_of_the_queries(rewrites, outputs, parse) -> None:
    given = masked("[b, 1, 1, 7]") + " { y = Attention(q, k, v, mask) }"
    result = masked("[b, 1, 1, 7]") + "<int64[2] length = {5, 1}> { e = Expand(mask, length) y = Attention(q, k, v, e) }"
    # ONNX Runtime 1.32 does not run the first graph: that is what the pass is for. The value is checked against the formula.
    model = rewrites(ExpandAttentionMask(), given, result, runs=False)
    plain = attention("p = MatMul(q, t) r = Mul(p, c) s = Add(r, mask)", inputs=f"{QKV}, float[b, 1, 1, 7] mask")
    np.testing.assert_allclose(outputs(model, 0)[0], outputs(parse(plain), 0)[0], rtol=0, atol=2e-6)


def test_attention_mask_is_expanded_to_a_symbolic_length(rewrites) -> None:
    given = masked("[b, 1, 1, 7]", "n") + " { y = Attention(q, k, v, mask) }"
    result = (
        masked("[b, 1, 1, 7]", "n")
        + """<int64[1] one = {1}> {
        n_ = Shape<start=2, end=3>(q) length = Concat<axis=0>(n_, one) e = Expand(mask, length) y = Attention(q, k, v, e) }"""
    )
    rewrites(ExpandAttentionMask(), given, result, runs=False)


def test_attention_mask_of_the_right_length_stays(leaves) -> None:
    leaves(ExpandAttentionMask(), masked("[b, 1, 5, 7]") + " { y = Attention(q, k, v, mask) }")


def test_a_fused_node_keeps_the_module_of_what_it_replaces(parse) -> None:
    model = parse(rms())
    for node in model.graph:
        node.metadata_props.update({"isthmus.module": "blocks.0.norm", "isthmus.operator": "mul"})
    FuseRMSNormalization()(model)
    (node,) = [n for n in model.graph if n.op_type == "RMSNormalization"]
    assert node.metadata_props == {"isthmus.module": "blocks.0.norm", "isthmus.operator": "rms_norm"}
    assert isinstance(node, ir.Node)
