"""Nodes of our own domain through the passes: taken apart, as standard operators of opset 27, and to another opset."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from isthmus.exporter.errors import UnsupportedError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops.onnx_forms import add_functions, custom_nodes
from isthmus.exporter.ops.onnx_models import one_node
from isthmus.exporter.passes import optimise
from isthmus.exporter.passes.convert_opset import ConvertOpset
from isthmus.exporter.passes.inline_custom_operators import InlineCustomOperators
from isthmus.exporter.passes.scope import MODULE, module_of
from isthmus.exporter.passes.to_standard_operators import ToStandardOperators

CONV = """g (float[B,4,L] x, float[4,1,3] w, float[4] b, float[B,4,2] s) => (float[B,4,L] y, float[B,4,2] l) {
    y, l = isthmus.CausalConv1d <silu: int = 1> (x, w, b, s)
}"""

CONV_INLINED = """g (float[B,4,L] x, float[4,1,3] w, float[4] b, float[B,4,2] s) => (float[B,4,L] y, float[B,4,2] l)
<int64[1] first = {-2}, int64[1] far = {9223372036854775807}, int64[1] axis = {2}> {
    padded = Concat <axis: int = 2> (s, x)
    l = Slice (padded, first, far, axis)
    linear = Conv <group: int = 4> (padded, w, b)
    sigmoid = Sigmoid (linear)
    y = Mul (linear, sigmoid)
}"""

LINEAR = """g (float[B,L,8] q, float[B,L,8] k, float[B,L,8] v, float[B,2,4,4] s) => (float[B,L,8] y, float[B,2,4,4] l) {
    y, l = isthmus.PlainLinearAttention <q_num_heads: int = 2, kv_num_heads: int = 2, scale: float = 0.5> (q, k, v, s)
}"""

LINEAR_27 = """g (float[B,L,8] q, float[B,L,8] k, float[B,L,8] v, float[B,2,4,4] s) => (float[B,L,8] y, float[B,2,4,4] l) {
    y, l = LinearAttention <q_num_heads: int = 2, kv_num_heads: int = 2, update_rule: string = "linear", scale: float = 0.5> (q, k, v, s)
}"""


def parse(text: str, opset: int = 23) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}, "isthmus" : 1]> {text}')
    add_functions(model)
    return model


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, feeds
    )


def nodes(model: ir.Model) -> list[tuple[str, dict[str, object]]]:
    return [(n.op_type, {name: a.value for name, a in n.attributes.items()}) for n in model.graph if n.op_type != "Constant"]


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(0))
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("rewrite", "opset", "given", "result", "shapes"),
    [
        (InlineCustomOperators(), 23, CONV, CONV_INLINED, {"x": (2, 4, 9), "w": (4, 1, 3), "b": (4,), "s": (2, 4, 2)}),
        (ToStandardOperators(), 27, LINEAR, LINEAR_27, {"q": (2, 5, 8), "k": (2, 5, 8), "v": (2, 5, 8), "s": (2, 2, 4, 4)}),
    ],
)
def test_given_and_result(rewrite, opset, given, result, shapes) -> None:
    model, expected = parse(given, opset), parse(result, opset)
    model.graph[0].metadata_props[MODULE] = "blocks.0"
    before = run(parse(given, opset), random(shapes))
    assert rewrite(model).modified
    assert {module_of(n) for n in model.graph} == {"blocks.0"}
    assert not model.functions
    assert "isthmus" not in model.opset_imports
    optimise(model)
    assert nodes(model) == nodes(expected)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for got, want in zip(run(model, random(shapes)), before, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert not rewrite(model).modified


def test_two_nodes_of_one_type_share_no_name() -> None:
    model = parse(
        """g (float[B,L,8] q, float[B,2,4,4] s) => (float[B,L,8] z, float[B,2,4,4] m) {
            y, l = isthmus.PlainLinearAttention <q_num_heads: int = 2, kv_num_heads: int = 2, scale: float = 0.5> (q, q, q, s)
            z, m = isthmus.PlainLinearAttention <q_num_heads: int = 2, kv_num_heads: int = 2, scale: float = 1.0> (y, q, q, l)
        }"""
    )
    feeds = random({"q": (1, 3, 8), "s": (1, 2, 4, 4)})
    before = run(model, feeds)
    InlineCustomOperators()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for got, want in zip(run(model, feeds), before, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_only_the_types_asked_for_are_taken_apart() -> None:
    model = parse(CONV)
    assert not InlineCustomOperators(frozenset({"RWKV7"}))(model).modified
    assert [n.op_type for n in custom_nodes(model)] == ["CausalConv1d"]
    assert list(model.functions) == [("isthmus", "CausalConv1d", "")]


def test_what_no_standard_operator_expresses_stays() -> None:
    op = OPS["rwkv7"]
    model = one_node(op, op.forms[0], {"num_heads": 1}, ir.DataType.FLOAT, opset=27)
    assert not ToStandardOperators()(model).modified
    assert [n.op_type for n in model.graph] == ["RWKV7"]


def test_a_selective_scan_of_dynamic_channels_has_no_standard_operator() -> None:
    op = OPS["selective_scan"]
    model = one_node(op, op.forms[0], {"delta_softplus": True, "reverse": False}, ir.DataType.FLOAT, opset=27)
    with pytest.raises(UnsupportedError, match="number of channels is dynamic"):
        ToStandardOperators()(model)


def test_the_passes_leave_nodes_with_bodies_alone() -> None:
    model = parse(CONV)
    body = str(model.functions["isthmus", "CausalConv1d", ""])
    optimise(model)
    assert [(n.domain, n.op_type) for n in model.graph] == [("isthmus", "CausalConv1d")]
    assert str(model.functions["isthmus", "CausalConv1d", ""]) == body


def test_an_opset_is_declared() -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23]> f (float[2,3] x) => (float[2,3] y) { y = Softplus (x) }')
    assert ConvertOpset(27)(model).modified
    assert model.opset_imports[""] == 27
    assert [n.op_type for n in model.graph] == ["Softplus"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not ConvertOpset(25)(model).modified


@pytest.mark.parametrize(
    ("node", "opset", "reason"),
    [
        ("y = GroupNormalization <num_groups: int = 1> (x, s, s)", 20, "since opset 21 scale and bias are for each channel"),
        ("y = MaxPool <kernel_shape: ints = [2], ceil_mode: int = 1> (x)", 20, "ceil_mode leaves out"),
        ("y = Cast <to: int = 18> (x)", 23, "infinities saturate"),
        ("y = NoSuchOperator (x)", 23, "not an operator of both opsets"),
    ],
)
def test_an_operator_that_means_something_else_there_is_refused(node: str, opset: int, reason: str) -> None:
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : {opset}]> f (float[1,4,8] x, float[1] s) => (float[A,B,C] y) {{ {node} }}'
    )
    with pytest.raises(UnsupportedError, match=reason):
        ConvertOpset(27)(model)
    assert model.opset_imports[""] == opset


def test_what_changed_only_for_other_nodes_is_not_refused() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]> f (float[1,4,8] x, int64 n) => (float[1,4,C] y, int64[M] r) {
            y = MaxPool <kernel_shape: ints = [2]> (x)
            r = Range (n, n, n)
        }"""
    )
    model.graph[1].outputs[0].dtype = ir.DataType.INT64
    assert ConvertOpset(27)(model).modified


def test_where_onnx_converts_without_change_ours_agrees() -> None:
    """onnx.version_converter rewrites nothing either in a graph of what models are made of."""
    text = """f (float[2,3,8] x, float[8] w) => (float[2,3,8] y) {
        n = LayerNormalization (x, w)
        g = Gelu (n)
        t = Transpose <perm: ints = [0, 2, 1]> (g)
        m = MatMul (g, t)
        s = Softmax (m)
        y = MatMul (s, x)
    }"""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    theirs = onnx.version_converter.convert_version(ir.to_proto(model), 25)
    ConvertOpset(25)(model)
    assert [n.op_type for n in theirs.graph.node] == [n.op_type for n in model.graph]
