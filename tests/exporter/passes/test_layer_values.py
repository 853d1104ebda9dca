"""Which values a layer reads and computes: with its bias, and with the function behind it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from isthmus.exporter.passes.layer_values import layer_values
from isthmus.exporter.passes.scope import MODULE


def model_of(body, output="float[2,4,8] y"):
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 23]> f (float[2,4,8] x) => ({output}) {{ {body} }}')
    shapes = {"w": (8, 8), "b": (8,), "s": (1,), "m": (4, 8), "k": (5, 4, 3), "c": (5,)}
    for node in model.graph:
        node.name = node.outputs[0].name
        node.metadata_props[MODULE] = f"net.{node.name}"
        for value in node.inputs:
            if value is not None and value.name in shapes and value.const_value is None:
                array = np.ones(shapes[value.name], np.float32)
                value.const_value = ir.tensor(array, name=value.name)
                value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
                model.graph.register_initializer(value)
    ir.passes.common.ShapeInferencePass()(model)
    return model


@pytest.mark.parametrize(
    ("body", "product", "result", "activation"),
    [
        ("y = MatMul (x, w)", "y", "y", ""),
        ("p = MatMul (x, w) y = Add (p, b)", "y", "y", ""),
        ("p = MatMul (x, w) y = Add (b, p)", "y", "y", ""),
        ("p = MatMul (x, w) q = Add (p, b) y = Relu (q)", "q", "y", "Relu"),
        ("p = MatMul (x, w) y = Tanh (p)", "p", "y", "Tanh"),
        ("p = MatMul (x, w) y = Gelu (p)", "p", "p", ""),
        ("p = MatMul (x, w) q = Sigmoid (p) y = Mul (p, q)", "p", "p", ""),
        ("p = MatMul (x, w) y = Add (p, m)", "p", "p", ""),
        ("p = MatMul (x, w) y = Add (p, s)", "p", "p", ""),
        ("p = MatMul (x, w) y = Add (p, p)", "p", "p", ""),
    ],
)
def test_what_a_product_computes(body, product, result, activation):
    (layer,) = layer_values(model_of(body))
    assert (layer.node, layer.operand, layer.weight, layer.axis) == (body.split()[0], "x", "w", 1)
    assert layer.module == f"net.{layer.node}"
    assert (layer.product, layer.result, layer.activation) == (product, result, activation)


def test_an_output_of_the_graph_is_what_it_is():
    (layer,) = layer_values(model_of("p = MatMul (x, w) y = Add (p, b)", "float[2,4,8] y, float[2,4,8] p"))
    assert layer.product == "p"


def test_convolutions_and_products_of_two_activations():
    layers = layer_values(model_of("a = Conv (x, k, c) r = Relu (a) y = MatMul (r, x)", "float[2,5,8] y"))
    assert [(layer.node, layer.axis, layer.product, layer.result, layer.activation) for layer in layers] == [("a", 0, "a", "r", "Relu")]
