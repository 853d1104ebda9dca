"""RecordScopes and NameValues: where a node comes from, and what it is called."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.passes import module_of, operator_of, optimise
from isthmus.exporter.passes._rewrite import MADE_BY_PASS
from isthmus.exporter.passes.name_values import NameValues
from isthmus.exporter.passes.scope import RecordScopes
from isthmus.exporter.trace import trace


def exported(names: str, classes: str) -> dict[str, str]:
    """The metadata that torch.onnx.export writes on a node."""
    return {
        "namespace": "whatever",
        "pkg.torch.onnx.name_scopes": names,
        "pkg.torch.onnx.class_hierarchy": classes,
        "pkg.torch.onnx.fx_node": "%linear_1 : ...",
        "pkg.torch.onnx.stack_trace": 'File "/home/someone/net.py", line 7, in forward',
    }


LINEAR = exported("['', 'attn.qkv', 'linear_1']", "['Net', 'torch.nn.modules.linear.Linear', 'aten.linear.default']")
RELU = exported("['', 'act', 'relu']", "['Net', 'torch.nn.modules.activation.ReLU', 'aten.relu.default']")


@pytest.fixture
def model() -> ir.Model:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        f (float[2, 4] x) => (float[2, 8] y) <float[4, 8] w = {0}, float[8] b = {0}> {
            val_7 = MatMul (x, w)
            linear_1 = Add (val_7, b)
            y = Relu (linear_1)
        }"""
    )
    for node, metadata in zip(model.graph, (LINEAR, LINEAR, RELU), strict=True):
        node.metadata_props.update(metadata)
    return model


def test_record_scopes_keeps_module_and_operator_and_no_path_of_the_exporting_machine(model: ir.Model) -> None:
    assert RecordScopes()(model).modified
    assert [dict(node.metadata_props) for node in model.graph] == [
        {"isthmus.module": "attn.qkv", "isthmus.operator": "linear"},
        {"isthmus.module": "attn.qkv", "isthmus.operator": "linear"},
        {"isthmus.module": "act", "isthmus.operator": "relu"},
    ]
    assert b"/home/someone" not in ir.to_proto(model).SerializeToString()
    assert not RecordScopes()(model).modified


def test_name_values_given_and_result(model: ir.Model) -> None:
    RecordScopes()(model)
    assert NameValues()(model).modified
    assert [(n.name, [v.name for v in n.inputs], [v.name for v in n.outputs]) for n in model.graph] == [
        ("attn.qkv/linear/MatMul", ["x", "w"], ["attn.qkv/linear/MatMul"]),
        ("attn.qkv/linear", ["attn.qkv/linear/MatMul", "b"], ["attn.qkv/linear"]),
        ("act/relu", ["attn.qkv/linear"], ["y"]),
    ]
    assert not NameValues()(model).modified


def test_a_module_that_makes_a_call_twice_counts_on() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23]> f (float[2] x) => (float[2] y) { a = Neg (x) b = Neg (a) y = Neg (b) }'
    )
    for node, call in zip(model.graph, ("neg", "neg_1", "neg_2"), strict=True):
        node.metadata_props.update(exported(f"['', 'blocks.0', '{call}']", "['Net', 'Block', 'aten.neg.default']"))
    RecordScopes()(model)
    NameValues()(model)
    assert [n.name for n in model.graph] == ["blocks.0/neg", "blocks.0/neg_1", "blocks.0/neg_2"]
    assert [n.outputs[0].name for n in model.graph][-1] == "y"


def test_constants_that_passes_made_are_called_after_their_contents(model: ir.Model) -> None:
    bias = model.graph.initializers["b"]
    bias.const_value = ir.tensor([-1, 16], name="b")
    bias.meta[MADE_BY_PASS] = True
    NameValues()(model)
    assert set(model.graph.initializers) == {"w", "const/int64_-1_16"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_every_node_of_an_export_says_which_module_it_belongs_to() -> None:
    torch.manual_seed(0)
    program = trace(Net().eval(), {"x": torch.randn(2, 3, 8)})
    model = optimise(to_onnx(program, opset=23, input_names=["x"], output_names=["y"]))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [(module_of(n), operator_of(n), n.op_type) for n in model.graph] == [
        entry
        for i in range(2)
        for entry in (
            (f"blocks.{i}.0", "layer_norm", "LayerNormalization"),
            (f"blocks.{i}.1", "linear", "MatMul"),
            (f"blocks.{i}.1", "linear", "Add"),
            (f"blocks.{i}.2", "gelu", "Gelu"),
            ("", "add", "Add"),
        )
    ]
    assert {name for name in model.graph.initializers if not name.endswith(".T")} <= set(dict(Net().named_parameters()))
    names = [v.name for n in model.graph for v in n.outputs]
    assert len(set(names)) == len(names)
    assert "blocks.1.0/layer_norm" in names
