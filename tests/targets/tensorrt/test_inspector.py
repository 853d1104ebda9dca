"""The engine is read back: what had to be FP8 and is not is named by its PyTorch module."""

import json

import pytest

from isthmus.exporter.errors import IsthmusError
from isthmus.targets.tensorrt.inspector import not_fp8, parse_layers
from isthmus.targets.tensorrt.recipe import Fp8Layer


def layer(name, nodes, inputs, tactic="", kind="gemm", separator="\x1f", **extra):
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": f"{name}.{i}", "Dimensions": [2, 4], "Format/Datatype": text} for i, text in enumerate(inputs)],
        "Outputs": [{"Name": f"{name}.out", "Dimensions": [2, 4], "Format/Datatype": "Half"}],
        "TacticName": tactic,
        "Metadata": separator.join(f"[ONNX Layer: {node}]" for node in nodes),
        **extra,
    }


def check(*layers, expected):
    return not_fp8(parse_layers(json.dumps({"Layers": list(layers), "Bindings": ["x", "y"]})), expected)


UP = Fp8Layer(node="node_up", module="blocks.0.up")
SCORES = Fp8Layer(node="node_scores", module="blocks.0.attention", operands=2)


@pytest.mark.parametrize(
    "found",
    [
        layer("a kernel of TensorRT", ["node_q", "node_up"], ["Half"], "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128"),
        layer("fused by Myelin", ["node_up", "node_bias"], ["FP8"], "__myl_FcAdd_0x1", separator=""),
        layer("another format", ["node_up"], ["Row major linear FP8 format"], separator="\x1e"),
        layer("a convolution", ["node_up"], ["Channel major FP8 format"], kind="CaskConvolution", Weights={"Type": "FP8", "Count": 9}),
    ],
    ids=lambda x: x["Name"],
)
def test_what_is_fp8(found):
    assert check(found, expected=[UP]) == []


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (layer("half", ["node_up"], ["Half"], "sm80_xmma_gemm_f16f16_f16f16_f16_nn"), r"reads Half, kernel sm80_xmma_gemm_f16f16"),
        (layer("half that writes FP8", ["node_up", "node_q"], ["Half"], "sm90_xmma_gemm_f16e4m3_f16f32_f32_tn_n"), "reads Half"),
        (
            layer("FP8 weights alone", ["node_up"], ["Half"], kind="CaskConvolution", Weights={"Type": "FP8", "Count": 9}),
            "reads Half, with weights in FP8",
        ),
        (layer("another node", ["node_up_2", "node_up/bias"], ["FP8"]), "no layer of the engine names it"),
        (layer("nothing described", ["node_up"], []), "reads no input that is described"),
    ],
    ids=lambda x: x["Name"] if isinstance(x, dict) else "",
)
def test_what_is_not_is_named_by_module(found, said):
    (reason,) = check(found, expected=[UP])
    assert reason.where == "blocks.0.up"
    assert said in reason.what
    assert "node node_up)" in reason.what
    assert "--fp8-exclude 'blocks.0.up'" in reason.fix


def test_a_product_of_attention_needs_both_operands_in_fp8():
    half = layer("scores", ["node_scores"], ["FP8", "Half"])
    assert [r.where for r in check(half, expected=[SCORES])] == ["blocks.0.attention"]
    assert check(layer("scores", ["node_scores"], ["FP8", "FP8"]), expected=[SCORES]) == []
    fused = layer("_gemm_mha_v2", ["node_scores", "node_softmax", "node_values"], ["FP8", "FP8", "FP8"])
    assert check(fused, expected=[SCORES]) == []


def test_a_node_in_several_layers_is_fp8_when_one_shows_it():
    quantising = layer("q", ["node_up"], ["Half"], kind="kgen")
    assert check(quantising, layer("up", ["node_up"], ["FP8"]), expected=[UP]) == []


def test_every_node_is_listed():
    names = [Fp8Layer(node=f"n{i}", module=f"m.{i}") for i in range(3)]
    assert [r.where for r in check(layer("l", ["n1"], ["FP8"]), expected=names)] == ["m.0", "m.2"]


@pytest.mark.parametrize(
    ("text", "message"), [("no json", "cannot be read"), ("{}", "cannot be read"), ('{"Layers": ["a", "b"]}', "by their names alone")]
)
def test_a_description_that_cannot_be_used(text, message):
    with pytest.raises(IsthmusError, match=message):
        parse_layers(text)
