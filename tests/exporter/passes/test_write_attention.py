"""WriteAttention: the graph before and after, and which nodes can be written out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from isthmus.exporter.passes.scope import MODULE
from isthmus.exporter.passes.write_attention import WriteAttention, writable

INPUTS = "float16[2, 3, 5, 8] q, float16[2, 3, 7, 8] k, float16[2, 3, 7, 4] v, float16[2, 1, 5, 7] m"


def parse(attention: str, inputs: str = INPUTS) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 23]> f ({inputs}) => (float16[2, 3, 5, 4] y) {{ {attention} }}')
    ir.passes.common.ShapeInferencePass()(model)
    for node in model.graph:
        node.name = node.outputs[0].name
        node.metadata_props[MODULE] = "net.attention"
    return model


def run(model: ir.Model) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(0))
    feeds = {v.name: np.asarray(rng.standard_normal([int(d) for d in v.shape])).astype(v.dtype.numpy()) for v in model.graph.inputs}
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    used = {i.name for i in session.get_inputs()}
    return session.run(None, {n: a for n, a in feeds.items() if n in used})[0]


@pytest.mark.parametrize("scale", ["", "<scale = 0.5>"])
@pytest.mark.parametrize("mask", [False, True])
def test_before_and_after(scale: str, mask: bool) -> None:
    model = parse(f"y = Attention{scale} (q, k, v{', m' if mask else ''})")
    expected = run(model)
    assert WriteAttention(lambda _: True)(model).modified
    masked = ["Add"] if mask else []
    assert [n.op_type for n in model.graph] == ["Mul", "Transpose", "MatMul", *masked, "Cast", "Softmax", "Cast", "MatMul"]
    softmax = next(n for n in model.graph if n.op_type == "Softmax")
    assert softmax.outputs[0].dtype == ir.DataType.FLOAT
    assert {n.metadata_props[MODULE] for n in model.graph} == {"net.attention"}
    assert [v.name for v in model.graph.outputs] == ["y"]
    ir.passes.common.ShapeInferencePass()(model)  # the shapes that it wrote are right
    np.testing.assert_allclose(run(model).astype(np.float32), expected.astype(np.float32), atol=4e-3)


@pytest.mark.parametrize("inputs", [INPUTS, INPUTS.replace("[2, 3, 5, 8] q", "[2, 3, 7, 8] q").replace("[2, 1, 5, 7]", "[2, 1, 7, 7]")])
@pytest.mark.parametrize("mask", [False, True])
def test_causal(inputs: str, mask: bool) -> None:
    text = f"y = Attention<is_causal = 1> (q, k, v{', m' if mask else ''})"
    queries = 5 if inputs == INPUTS else 7
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 23]> f ({inputs}) => (float16[2, 3, {queries}, 4] y) {{ {text} }}')
    expected = run(model)
    for node in model.graph:
        node.name = node.outputs[0].name
    assert WriteAttention(lambda _: True)(model).modified
    masked = ["Shape", "ConstantOfShape", "Trilu", "Cast", "Where", *(["Add"] if mask else [])]
    assert [n.op_type for n in model.graph] == ["Mul", "Transpose", "MatMul", *masked, "Cast", "Softmax", "Cast", "MatMul"]
    ir.passes.common.ShapeInferencePass()(model)
    np.testing.assert_allclose(run(model).astype(np.float32), expected.astype(np.float32), atol=4e-3)


def test_only_what_the_condition_holds_for() -> None:
    model = parse("h = Attention (q, k, k) y = Attention (h, k, v)")
    WriteAttention(lambda node: node.outputs[0].name == "h")(model)
    assert [n.op_type for n in model.graph].count("Attention") == 1
    assert not WriteAttention(lambda _: False)(model).modified


def test_in_the_body_of_a_branch() -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 11, opset_import: ["" : 23]> f ({INPUTS}, bool c) => (float16[2, 3, 5, 4] y) {{
            y = If (c) <
                then_branch = g () => (float16[2, 3, 5, 4] t) {{ t = Attention (q, k, v) }},
                else_branch = h () => (float16[2, 3, 5, 4] e) {{ e = Attention<scale = 0.5> (q, k, v) }}
            >
        }}"""
    )
    expected = run(model)
    assert WriteAttention(lambda _: True)(model).modified
    written = ["Mul", "Transpose", "MatMul", "Cast", "Softmax", "Cast", "MatMul"]
    assert [[n.op_type for n in graph] for graph in model.graph.subgraphs()] == [written, written]
    assert [n.op_type for n in model.graph] == ["If"]
    np.testing.assert_allclose(run(model).astype(np.float32), expected.astype(np.float32), atol=4e-3)


@pytest.mark.parametrize(
    ("attention", "inputs"),
    [
        ("y = Attention<softcap = 1.0> (q, k, v)", INPUTS),
        ("y = Attention (q, k, v, b)", INPUTS.replace("float16[2, 1, 5, 7] m", "bool[5, 7] b")),
        ("y = Attention (q, k, v)", INPUTS.replace("[2, 3, 7", "[2, 1, 7")),
        ("y = Attention<q_num_heads = 2, kv_num_heads = 2> (s, s, s)", f"{INPUTS}, float16[2, 5, 8] s"),
    ],
)
def test_what_it_does_not_take(attention: str, inputs: str) -> None:
    model = parse(attention, inputs)
    assert not writable(model.graph[0])
    assert not WriteAttention(lambda _: True)(model).modified
