"""Mixtures of experts in ONNX Runtime: what com.microsoft.MoE computes, and what `--experts` writes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from isthmus import pipeline
from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.passes import optimise
from isthmus.exporter.spec import MODELS
from isthmus.exporter.trace import trace
from isthmus.exporter.weights import random_weights
from isthmus.targets.onnxruntime.experts import write_experts

CONTRIB = "com.microsoft"
Array = np.ndarray[Any, Any]


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def moe(x: str, logits: str, y: str, **attributes: Any) -> onnx.NodeProto:
    settings = {"k": 2, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0} | attributes
    return helper.make_node("MoE", [x, logits, "up", "", "down"], [y], domain=CONTRIB, **settings)


def graph(nodes: list[onnx.NodeProto], up: Array, down: Array) -> onnx.ModelProto:
    """A graph of x (n, d) and logits (n, E) to y; the weights (E, 2 h, d), gate and up by turns, and (E, d, h)."""
    dtype = helper.np_dtype_to_tensor_dtype(up.dtype)
    ends = [helper.make_tensor_value_info(name, dtype, ["n", size]) for name, size in (("x", up.shape[2]), ("logits", up.shape[0]))]
    weights = [onnx.numpy_helper.from_array(up, "up"), onnx.numpy_helper.from_array(down, "down")]
    y = helper.make_tensor_value_info("y", dtype, ["n", up.shape[2]])
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(helper.make_graph(nodes, "g", ends, [y], weights), opset_imports=imports, ir_version=10)


def experts_that_give_their_number(count: int) -> tuple[Array, Array]:
    """Experts of which number e answers 1 in channel e to the token (1, 0, ..), so that y has the weights."""
    up, down = np.zeros((count, 2, count), np.float32), np.zeros((count, count, 1), np.float32)
    up[:, 0, 0], up[:, 1, 0] = 20, 1 / 20  # silu(20) = 20 in float32
    down[np.arange(count), np.arange(count)] = 1
    return up, down


@pytest.mark.parametrize(("count", "k"), [(3, 2), (8, 2), (16, 4), (64, 8)])
def test_of_equal_probabilities_onnx_runtime_takes_the_higher_index(count: int, k: int) -> None:
    """Why the experts stand in reverse order. When this fails, see how ties are broken now, and change FuseExperts."""
    logits = np.random.default_rng(0).integers(0, 3, (200, count)).astype(np.float32)
    x = np.zeros((200, count), np.float32)
    x[:, 0] = 1
    y = session(graph([moe("x", "logits", "y", k=k)], *experts_that_give_their_number(count))).run(None, {"x": x, "logits": logits})[0]
    chosen = np.argsort(-logits[:, ::-1], axis=1, kind="stable")[:, :k]
    expected = np.zeros(logits.shape, bool)
    np.put_along_axis(expected, count - 1 - chosen, True, axis=1)
    np.testing.assert_array_equal(y > 0, expected)


@pytest.mark.parametrize("normalize", [0, 1])
def test_it_takes_logits_and_the_softmax_is_over_all_experts(normalize: int) -> None:
    """The input is called router_probs."""
    logits = np.log(np.array([[0.1, 0.5, 0.3, 0.1]], np.float32)) + 3
    model = graph([moe("x", "logits", "y", normalize_routing_weights=normalize)], *experts_that_give_their_number(4))
    y = session(model).run(None, {"x": np.eye(1, 4, dtype=np.float32), "logits": logits})[0]
    np.testing.assert_allclose(y, [[0, 0.625, 0.375, 0] if normalize else [0, 0.5, 0.3, 0]], atol=1e-6)


@pytest.mark.parametrize("fusion", [0, 2])
def test_it_takes_interleaved_weights_only(fusion: int) -> None:
    """When this fails for 2, the weights need no interleaving."""
    with pytest.raises(Exception, match="only supports interleaved SwiGLU"):
        session(graph([moe("x", "logits", "y", swiglu_fusion=fusion)], *experts_that_give_their_number(4)))


def test_the_cpu_has_a_float32_kernel_only() -> None:
    """When this fails, see whether FuseExperts still needs casts around the operator."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def

    kernels = [kernel for kernel in get_all_opkernel_def() if (kernel.op_name, kernel.domain) == ("MoE", CONTRIB)]
    assert [kernel.type_constraints for kernel in kernels if kernel.provider == "CPUExecutionProvider"] == [{"T": ["tensor(float)"]}]


@functools.cache
def dense_form(name: str) -> ir.Model:
    """A mixture of 3 of 6 experts whose logits are small integers for tokens of small integers, one expert of which holds a NaN."""
    spec = MODELS[name].spec({"num_experts": 6, "top_k": 3})
    module = random_weights(spec, seed=0)
    module.gate.weight.copy_(torch.randint(0, 2, module.gate.weight.shape, generator=torch.Generator().manual_seed(0)).float())
    module.gate.weight[5] = module.gate.weight[1]
    module.gate_up_proj[2, 3, 4] = float("nan")
    program = trace(module, spec.inputs(np.random.default_rng(0), spec.sizes), dynamic=spec.dynamic, ranges=spec.ranges)
    return optimise(to_onnx(program, opset=23, input_names=("x",), output_names=("y",)))


@pytest.mark.parametrize("name", ["moe-tiny", pytest.param("moe-step-tiny", marks=pytest.mark.matrix)])
def test_ties_no_tokens_and_experts_that_are_not_finite(name: str) -> None:
    """Both forms choose the lower index of equal logits, and neither lets an expert through that was not chosen."""
    fused = dense_form(name).clone()
    (note,) = write_experts(fused, "fused", "cpu")
    assert note.startswith("1 mixture of experts is computed by com.microsoft.MoE")
    assert "MoE" in [node.op_type for node in fused.graph]
    forms = [session(ir.to_proto(model)) for model in (dense_form(name), fused)]
    x = np.random.default_rng(1).integers(-1, 2, (200, 16)).astype(np.float32)
    for count in (200, 0):
        tokens = x[:count] if "step" in name else x[None, :count]
        want, got = (form.run(None, {"x": tokens})[0] for form in forms)
        assert got.shape == tokens.shape
        lost = np.isnan(want).any(-1)
        assert (0 < lost.sum() < 200) == bool(count)
        np.testing.assert_array_equal(np.isnan(got).any(-1), lost)
        np.testing.assert_allclose(got[~lost], want[~lost], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("experts", "provider"), [("dense", "cpu"), ("fused", "cuda")])
def test_what_is_left_dense(experts: Literal["fused", "dense"], provider: Literal["cpu", "cuda"]) -> None:
    model = dense_form("moe-tiny").clone()
    assert write_experts(model, experts, provider) == []
    assert [node.op_type for node in model.graph] == [node.op_type for node in dense_form("moe-tiny").graph]


@pytest.mark.parametrize(("precision", "experts"), [("fp16", "fused"), pytest.param("fp32", "dense", marks=pytest.mark.matrix)])
def test_an_export(precision: str, experts: str, tmp_path: Path) -> None:
    options = {"experts": experts, "threads": 1}
    result = pipeline.export("moe-tiny", "onnxruntime", tmp_path / "bundle", precision=precision, options=options)
    assert result.manifest.verdict == "verified"
    file = onnx.load(tmp_path / "bundle" / "model.onnx")
    assert [node.op_type for node in file.graph.node].count("MoE") == (experts == "fused")
    stored = {each.data_type for each in file.graph.initializer if len(each.dims) > 1 and max(each.dims) > 8}
    assert stored == {TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT}


@pytest.mark.matrix
def test_quantised_products_are_left(tmp_path: Path) -> None:
    """`--precision int8` with every product in it: what the mixture then is made of is no constant weight."""
    pipeline.export(
        "moe-tiny",
        "onnxruntime",
        tmp_path / "bundle",
        precision="int8",
        calibration_data="random",
        options={"int8_include": ("*",), "threads": 1},
        settings={"dim": 32, "hidden_dim": 32},
    )
    file = onnx.load(tmp_path / "bundle" / "model.onnx")
    types = [node.op_type for node in file.graph.node]
    assert "MoE" not in types
    assert "QuantizeLinear" in types
