"""Types and shapes of every value."""

from __future__ import annotations

import onnx_ir as ir

from isthmus.exporter.passes.infer_shapes import InferShapes

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'


def test_missing_shapes_are_filled_in_with_the_callers_names() -> None:
    model = ir.from_onnx_text(f"{HEAD} f (float[batch, 16] x, float[16, 4] w) => (float[batch, 4] z) {{ y = MatMul(x, w) z = Relu(y) }}")
    assert InferShapes()(model).modified
    y = model.graph[0].outputs[0]
    assert (y.dtype, y.shape) == (ir.DataType.FLOAT, ir.Shape(["batch", 4]))
    assert not InferShapes()(model).modified


def test_a_name_that_is_there_stays_and_made_up_names_are_not_taken_over() -> None:
    model = ir.from_onnx_text(f"{HEAD} f (float[a, 4] x, float[b, 4] y) => (float[rows, 4] z) {{ c = Concat<axis=0>(x, y) z = Relu(c) }}")
    InferShapes()(model)
    assert model.graph[0].outputs[0].shape == ir.Shape([None, 4])  # onnx itself would say "unk__0"
    assert model.graph.outputs[0].shape == ir.Shape(["rows", 4])


def test_an_annotation_is_not_overwritten_by_a_contradiction() -> None:
    model = ir.from_onnx_text(f"{HEAD} f (float[2, 4] x) => (float[2, 4] z) {{ y = Relu(x) z = Relu(y) }}")
    model.graph[0].outputs[0].shape = ir.Shape([3, 4])
    InferShapes()(model)
    assert model.graph[0].outputs[0].shape == ir.Shape([3, 4])


def test_weights_are_neither_read_nor_serialised() -> None:
    def read() -> ir.TensorProtocol:
        raise AssertionError("the weight was read")

    # 4 GiB, twice what a protobuf holds.
    tensor = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([1 << 15, 1 << 15]), name="w")
    weight = ir.Value(name="w", const_value=tensor, shape=ir.Shape([1 << 15, 1 << 15]), type=ir.TensorType(ir.DataType.FLOAT))
    x = ir.Value(name="x", shape=ir.Shape(["n", 1 << 15]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [x, weight])
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 23}, name="g"), ir_version=10)
    InferShapes()(model)
    assert node.outputs[0].shape == ir.Shape(["n", 1 << 15])
    assert list(model.graph.initializers) == ["w"]
    assert list(model.graph.inputs) == [x]


def test_bodies_of_control_flow_are_annotated() -> None:
    model = ir.from_onnx_text(f"""{HEAD} f (float[2] x, bool c) => (float[2] z) {{
        z = If(c) <then_branch = g () => (float[2] t) {{ a = Neg(x) t = Neg(a) }}, else_branch = h () => (float[2] e) {{ e = Neg(x) }}>
    }}""")
    InferShapes()(model)
    body = model.graph[0].attributes["then_branch"].as_graph()
    assert body[0].outputs[0].shape == ir.Shape([2])
