"""FuseExperts: the graphs before and after, what they compute, and what is left as it is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from isthmus.exporter.passes.fuse_experts import FuseExperts
from isthmus.exporter.passes.half_precision import ToHalf

E, H, D = 3, 4, 5
RNG = np.random.Generator(np.random.PCG64(0))
UP = RNG.standard_normal((E, 2 * H, D)).astype(np.float32)  # gates before ups
DOWN = RNG.standard_normal((E, H, D)).astype(np.float32)


def text(array: np.ndarray) -> str:
    return "{" + ", ".join(str(each) for each in array.reshape(-1).tolist()) + "}"


CONSTANTS = """int64[1] minus_1 = {-1}, int64[1] minus_2 = {-2}, float zero = {0}, int64 two = {2},
    bool[3, 3] earlier = {0, 0, 0, 1, 0, 0, 1, 1, 0}"""

ROUTER = """
    mine = Unsqueeze(logits, minus_1)
    others = Unsqueeze(logits, minus_2)
    larger = Greater(others, mine)
    equal = Equal(others, mine)
    before = And(equal, earlier)
    ahead = Or(larger, before)
    counted = Cast<to=7>(ahead)
    places = ReduceSum<keepdims=0>(counted, minus_1)
    chosen = Less(places, two)
    all = Softmax<axis=-1>(logits)
    some = Where(chosen, all, zero)
    total = ReduceSum<keepdims=1>(some, minus_1)
    weights = Div(some, total)"""

DENSE = f"""f (float[b, l, 5] x, float[b, l, 3] logits) => (float[b, l, 5] y)
    <float[5, 24] up_weight = {text(UP.reshape(-1, D).T)}, float[12, 5] down_weight = {text(DOWN)},
     int64[4] heads = {{0, -1, 3, 8}}, int64[3] one = {{0, -1, 12}}, {CONSTANTS}> {{{ROUTER}
    weight = Unsqueeze(weights, minus_1)
    layer = MatMul(x, up_weight)
    apart = Reshape(layer, heads)
    gate, up = Split<axis=3, num_outputs=2>(apart)
    sigmoid = Sigmoid(gate)
    silu = Mul(gate, sigmoid)
    weighted = Mul(weight, silu)
    product = Mul(weighted, up)
    positive = Greater(weight, zero)
    hidden = Where(positive, product, zero)
    flat = Reshape(hidden, one)
    y = MatMul(flat, down_weight)
}}"""

GATHERED = f"""f (float[b, 5] x, float[b, 3] logits) => (float[b, 5] y)
    <float[3, 8, 5] up_weight = {text(UP)}, float[3, 4, 5] down_weight = {text(DOWN)},
     int64[2, 1] order = {{0, 1}}, int64[3] numbers = {{0, 1, 2}}, {CONSTANTS}> {{{ROUTER}
    spread = Unsqueeze(places, minus_2)
    indicator = Equal(spread, order)
    ones = Cast<to=7>(indicator)
    numbered = Mul(ones, numbers)
    index = ReduceSum<keepdims=1>(numbered, minus_1)
    candidates = Unsqueeze(weights, minus_2)
    taken = Where(indicator, candidates, zero)
    weight = ReduceSum<keepdims=1>(taken, minus_1)
    ups = GatherND(up_weight, index)
    row = Unsqueeze(x, minus_2)
    column = Unsqueeze(row, minus_1)
    multiplied = MatMul(ups, column)
    layer = Squeeze(multiplied, minus_1)
    gate, up = Split<axis=2, num_outputs=2>(layer)
    sigmoid = Sigmoid(gate)
    silu = Mul(gate, sigmoid)
    weighted = Mul(weight, silu)
    product = Mul(weighted, up)
    hidden = Unsqueeze(product, minus_2)
    downs = GatherND(down_weight, index)
    outs = MatMul(hidden, downs)
    each = Squeeze(outs, minus_2)
    y = ReduceSum<keepdims=0>(each, minus_2)
}}"""

MOE = """com.microsoft.MoE<k = 2, normalize_routing_weights = 1, activation_type = "swiglu", swiglu_fusion = 1, activation_alpha = 1.0,
    activation_beta = 0.0>"""
TAIL = f"""<int64[3] two_one_zero = {{2, 1, 0}}, int64[2] shape = {{-1, 3}},
    float[3, 8, 5] up = {text(np.stack(np.split(UP, 2, axis=1), axis=2)[::-1])},
    float[3, 5, 4] down = {text(DOWN[::-1].transpose(0, 2, 1))}>"""
DENSE_RESULT = f"""f (float[b, l, 5] x, float[b, l, 3] logits) => (float[b, l, 5] y) {TAIL} {{
    backwards = Gather<axis = -1>(logits, two_one_zero)
    rows = Reshape(backwards, shape)
    y = {MOE}(x, rows, up, "", down)
}}"""
GATHERED_RESULT = f"""f (float[b, 5] x, float[b, 3] logits) => (float[b, 5] y) {TAIL} {{
    backwards = Gather<axis = -1>(logits, two_one_zero)
    y = {MOE}(x, backwards, up, "", down)
}}"""

FORMS = {"dense": (DENSE, DENSE_RESULT), "gathered": (GATHERED, GATHERED_RESULT)}


def fused(parse, given: str, *, half: bool = False) -> ir.Model:
    model = parse(given)
    if half:
        ToHalf()(model)
    fuse = FuseExperts()
    assert fuse(model).modified
    assert fuse.fused == 1
    RemoveUnusedNodesPass()(model)
    return model


def described(model: ir.Model) -> list[object]:
    """Nodes, attributes, and inputs: constants by their contents, others by what made them."""

    def origin(value: ir.Value | None) -> object:
        if value is None or value.producer() is None:
            constant = value is not None and value.const_value is not None
            return value.const_value.numpy().tolist() if constant else value and value.name
        return value.producer().op_type

    return [
        (node.domain, node.op_type, {name: a.value for name, a in node.attributes.items()}, [origin(value) for value in node.inputs])
        for node in model.graph
    ]


@pytest.mark.parametrize("form", FORMS)
def test_before_and_after(parse, outputs, check_ir, form: str) -> None:
    given, result = FORMS[form]
    model = fused(parse, given)
    check_ir(model)
    expected = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> {result}')
    assert described(model) == described(expected)
    assert {domain: model.opset_imports[domain] for domain in ("", "com.microsoft")} == {"": 23, "com.microsoft": 1}
    for seed in (0, 1):
        got, want = outputs(model, seed)[0], outputs(parse(given), seed)[0]
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-7 * np.ptp(want) + 1e-7)
    assert not FuseExperts()(model).modified


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_not_normalised(parse, outputs, form: str) -> None:
    given = FORMS[form][0].replace("weights = Div(some, total)", "").replace("Unsqueeze(weights,", "Unsqueeze(some,")
    model = fused(parse, given)
    (moe,) = [node for node in model.graph if node.op_type == "MoE"]
    assert moe.attributes["normalize_routing_weights"].as_int() == 0
    want = outputs(parse(given), 0)[0]
    np.testing.assert_allclose(outputs(model, 0)[0], want, rtol=0, atol=2e-7 * np.ptp(want) + 1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_computes_in_float32_and_stores_float16(parse, outputs, check_ir, form: str) -> None:
    # A router's product gives the logits: float16 inputs that comparisons round and the softmax does not would be another mixture.
    routed = FORMS[form][0].replace("3] logits)", "3] token)").replace("mine = ", "logits = MatMul(token, router) mine = ")
    given = routed.replace("float zero = {0}", "float zero = {0}, float[3, 3] router = {1, 0, 0, 0, 1, 0, 0, 0, 1}")
    model = fused(parse, given, half=True)
    check_ir(model)
    (moe,) = [node for node in model.graph if node.op_type == "MoE"]
    assert {value.dtype for value in (*moe.inputs, *moe.outputs) if value is not None} == {ir.DataType.FLOAT}
    weights = [moe.inputs[i].producer() for i in (2, 4)]
    assert [(node.op_type, node.inputs[0].dtype) for node in weights] == [("Cast", ir.DataType.FLOAT16)] * 2
    want = outputs(parse(given), 0)[0]
    np.testing.assert_allclose(outputs(model, 0)[0], want, rtol=0, atol=2e-3 * np.ptp(want))


def test_weights_behind_reshapes_and_transpositions(parse, outputs) -> None:
    """As torch exports them: one parameter a stack, (E, 2 h, d) and (E, h, d)."""
    stored = DENSE.replace(
        f"float[5, 24] up_weight = {text(UP.reshape(-1, D).T)}", f"float[3, 8, 5] stored = {text(UP)}, int64[2] s = {{24, 5}}"
    )
    given = stored.replace("layer = Mat", "rows = Reshape(stored, s) up_weight = Transpose<perm=[1, 0]>(rows) layer = Mat")
    model = fused(parse, given)
    moe = model.graph[-1]
    np.testing.assert_array_equal(moe.inputs[2].const_value.numpy(), fused(parse, DENSE).graph[-1].inputs[2].const_value.numpy())
    np.testing.assert_allclose(outputs(model, 0)[0], outputs(parse(given), 0)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        ("dense", "{0, 0, 0, 1, 0, 0, 1, 1, 0}", "{0, 1, 1, 0, 0, 1, 0, 0, 0}"),  # of equal logits the higher index first
        ("dense", "larger = Greater", "larger = Less"),  # the smallest
        ("dense", "all = Softmax<axis=-1>(logits)", "all = Sigmoid(logits)"),
        ("dense", "all = Softmax<axis=-1>(logits)", "half = Mul(logits, logits) all = Softmax<axis=-1>(half)"),  # chosen by others
        ("dense", "silu = Mul(gate, sigmoid)", "silu = Mul(gate, gate)"),
        ("dense", "sigmoid = Sigmoid(gate)", "sigmoid = Sigmoid(up)"),
        ("dense", "hidden = Where(positive, product, zero)", "hidden = Where(positive, product, weight)"),
        ("dense", "float[b, l, 3] logits", "float[1, 1, 3] logits"),  # one choice for all tokens
        ("dense", "up_weight)", "moved)"),  # a weight that is no constant
        ("gathered", "{0, 1}", "{1, 0}"),
        ("gathered", "numbers = {0, 1, 2}", "numbers = {2, 1, 0}"),
        ("gathered", "downs = GatherND(down_weight, index)", "other = Add(index, index) downs = GatherND(down_weight, other)"),
        ("gathered", "y = ReduceSum<keepdims=0>(each, minus_2)", "y = ReduceMean<keepdims=0>(each, minus_2)"),
    ],
)
def test_near_misses_are_left(leaves, form: str, old: str, new: str) -> None:
    given = FORMS[form][0]
    assert old in given
    given = given.replace(old, new)
    if new == "moved)":
        given = given.replace("layer = Mat", "total_x = ReduceSum<keepdims=0>(x) moved = Add(up_weight, total_x) layer = Mat")
    leaves(FuseExperts(), given)
