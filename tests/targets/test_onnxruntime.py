"""The onnxruntime target: its sessions, its provider check, its mask pass and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from isthmus import pipeline
from isthmus.exporter.errors import IsthmusError, MachineError, UnsupportedError
from isthmus.exporter.op import OPS
from isthmus.exporter.ops import native
from isthmus.exporter.ops.native import torch_hook
from isthmus.exporter.ops.onnx_models import node_of, one_node
from isthmus.exporter.passes.expand_attention_mask import ExpandAttentionMask
from isthmus.exporter.target import TARGETS
from isthmus.targets.onnxruntime import OnnxRuntimeOptions
from isthmus.targets.onnxruntime.session import OnnxRuntimeRunner
from isthmus.targets.onnxruntime.ssm_op import write_ssm_op
from isthmus.targets.onnxruntime.support import unsupported, without_standard_operator

ADD = '<ir_version: 10, opset_import: ["" : 23]> g (float[N,3] x, float[3] y) => (float[N,3] z) { z = Add(x, y) }'


@pytest.fixture
def add(tmp_path: Path) -> Path:
    path = tmp_path / "add.onnx"
    ir.save(ir.from_onnx_text(ADD), path)
    return path


@pytest.mark.parametrize("optimization", ["disable", "basic", "extended", "all"])
def test_a_runner_executes_and_names_its_provider(add: Path, optimization: str) -> None:
    with OnnxRuntimeRunner(add, optimization=optimization, threads=1) as runner:  # type: ignore[arg-type]  # a string will do
        outputs = runner.run({"x": np.ones((2, 3), np.float32), "y": np.arange(3, dtype=np.float32)})
        assert runner.device == "CPUExecutionProvider"
    np.testing.assert_array_equal(outputs["z"], [[1, 2, 3], [1, 2, 3]])


def test_every_input_that_does_not_fit_is_named(add: Path) -> None:
    with OnnxRuntimeRunner(add) as runner, pytest.raises(IsthmusError) as caught:
        runner.run({"x": np.ones((2, 3), np.float64), "w": np.ones(3, np.float32)})
    text = str(caught.value)
    assert "x: has dtype float64, expected float32" in text
    assert "y: the model has this input" in text
    assert "w: was given" in text


def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(IsthmusError, match=r"refuses model\.onnx"):
        OnnxRuntimeRunner(tmp_path / "model.onnx")


def test_a_provider_that_is_not_installed_is_an_error_of_the_machine(add: Path) -> None:
    with pytest.raises(MachineError, match="has no CUDAExecutionProvider") as caught:
        OnnxRuntimeRunner(add, provider="cuda")
    assert caught.value.exit_code == 5
    with pytest.raises(MachineError):
        TARGETS["onnxruntime"]().check_machine(OnnxRuntimeOptions(execution_provider="cuda"))


def test_a_silent_fall_back_to_the_cpu_is_an_error(add: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What onnxruntime-gpu does where libcudnn is missing: the provider is listed, and the session opens on the CPU.
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    fallen_back = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **__: fallen_back)
    with pytest.raises(MachineError, match="asked for CUDAExecutionProvider, ONNX Runtime runs on CPUExecutionProvider"):
        OnnxRuntimeRunner(add, provider="cuda")


MASKED = """<ir_version: 10, opset_import: ["" : 23]>
g (float[B,2,{s},8] q, float[B,2,5,8] k, float[B,2,5,8] v, bool[{mask}] m) => (float[B,2,{s},8] y) {{ y = Attention(q, k, v, m) }}"""


def masked(s: str, mask: str) -> ir.Model:
    model = ir.from_onnx_text(MASKED.format(s=s, mask=mask))
    return ExpandAttentionMask()(model).model


@pytest.mark.parametrize("s", ["4", "S"])
def test_the_expanded_mask_computes_masked_attention(s: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(masked(s, "B,1,1,5"), path)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((3, 2, 4, 8), (3, 2, 5, 8), (3, 2, 5, 8)))
    m = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0]], bool).reshape(3, 1, 1, 5)
    scores = np.where(m, q @ k.swapaxes(-1, -2) / np.sqrt(8), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    with OnnxRuntimeRunner(path) as runner:
        y = runner.run({"q": q.astype(np.float32), "k": k.astype(np.float32), "v": v.astype(np.float32), "m": m})["y"]
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_onnx_runtime_still_refuses_a_mask_that_broadcasts_over_the_queries() -> None:
    """When this fails, drop ExpandAttentionMask."""
    model = ir.from_onnx_text(MASKED.format(s="4", mask="B,1,1,5"))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    q, k = np.zeros((1, 2, 4, 8), np.float32), np.zeros((1, 2, 5, 8), np.float32)
    with pytest.raises(Exception, match="inconsistent q_sequence_length"):
        session.run(None, {"q": q, "k": k, "v": k, "m": np.ones((1, 1, 1, 5), bool)})


def test_every_unsupported_node_is_listed() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23, "acme" : 1]> g (float[3] x, bfloat16[3] b) => (float[3] y, bfloat16[3] c) '
        "{ y = acme.Frobnicate(x)\n c = Add(b, b) }"
    )
    model.graph[0].metadata_props["isthmus.module"] = "blocks.3"
    reasons = [str(r) for r in unsupported(model)]
    assert len(reasons) == 2
    assert "blocks.3: operator acme::Frobnicate" in reasons[0]
    assert "Add computes in bfloat16" in reasons[1]


def test_capabilities_name_the_installed_version() -> None:
    found = {c.name: c for c in TARGETS["onnxruntime"]().capabilities()}
    assert found["verify"].available
    assert ort.__version__ in found["verify"].detail


def test_a_node_in_a_function_is_looked_at_too() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23, "ours" : 1]> g (float[3] x) => (float[3] y) { y = ours.Twice(x) }
        <domain: "ours", opset_import: ["" : 23, "acme" : 1]> Twice (x) => (y) { y = acme.Frobnicate(x) }"""
    )
    assert [str(r).split(" has")[0] for r in unsupported(model)] == ["operator acme::Frobnicate"]


SSM_OPS = ("onnx27", "plugin", "decomposed")


_FORMS = [("plugin", "fp32"), *(pytest.param(form, "fp16", marks=pytest.mark.matrix) for form in ("plugin", "decomposed", "onnx27"))]


@pytest.mark.parametrize(("ssm_op", "precision"), _FORMS)
def test_a_model_with_scans_is_verified_in_every_form(ssm_op: str, precision: str, tmp_path: Path) -> None:
    result = pipeline.export(
        "diffussm-tiny",
        "onnxruntime",
        tmp_path / "bundle",
        precision=precision,
        settings={"depth": 1},
        options={"ssm_op": ssm_op, "threads": 1},
    )
    stages = {stage.name: stage for stage in result.manifest.stages}
    kernels = stages.pop("native", None)
    assert {stage.verdict for stage in stages.values()} == {"verified"}
    assert stages["onnx"].device == "CPUExecutionProvider"
    assert (kernels is not None) == (ssm_op == "plugin")
    if kernels is not None:
        library = native.library()
        assert kernels.verdict == ("verified" if library else "not run")
        assert kernels.device == (f"CPUExecutionProvider with {library.name}" if library else "")
    model = ir.load(tmp_path / "bundle" / "model.onnx")
    domains = {node.domain for node in model.graph.all_nodes()}
    types = [node.op_type for node in model.graph.all_nodes()]
    if ssm_op == "plugin":
        assert domains == {"", "isthmus"}
        assert sorted(name for _, name, _ in model.functions) == ["CausalConv1d", "SelectiveScan"]
        scan = next(node for node in model.graph if node.op_type == "SelectiveScan")
        half = ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.FLOAT
        # u, delta, A, B, C, D, delta_bias, initial_state: no cast around the node, and none of what it sums with.
        narrow = [half, half, ir.DataType.FLOAT, half, half, *[ir.DataType.FLOAT] * 3]
        assert [value.dtype for value in scan.inputs if value is not None] == narrow
        assert [value.dtype for value in scan.outputs] == [half, ir.DataType.FLOAT]
        return
    assert domains == {""}
    assert not model.functions
    assert types.count("LinearAttention" if ssm_op == "onnx27" else "Scan") == 2
    assert types.count("CausalConvWithState" if ssm_op == "onnx27" else "Conv") == 2
    assert model.opset_imports[""] == (27 if ssm_op == "onnx27" else 23)


def test_the_reference_is_not_computed_by_the_kernels_that_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def used() -> None:
        raise AssertionError("the native library computed a reference")

    monkeypatch.setattr(torch_hook, "_library", used)
    result = pipeline.export("diffussm-tiny", "onnxruntime", tmp_path / "bundle", precision="fp16", settings={"depth": 1})
    assert result.exit_code == 0


def one(name: str, opset: int = 23, **attributes: object) -> ir.Model:
    op = OPS[name]
    return one_node(op, op.forms[0], op.resolve(attributes), ir.DataType.FLOAT, static={"channels": 4, "width": 3, "state": 4}, opset=opset)


def test_what_the_standard_lacks_is_refused_with_every_reason() -> None:
    assert [str(r) for r in without_standard_operator(one("rwkv7", num_heads=2))] == [
        "rwkv7 has no standard operator in opset 27: no update rule of the standard LinearAttention has a removal key apart from the "
        "write key (fix: choose --ssm-op plugin or decomposed)"
    ]
    assert not without_standard_operator(one("causal_conv1d"))
    dynamic = one_node(OPS["causal_conv1d"], OPS["causal_conv1d"].forms[0], {"silu": True}, ir.DataType.FLOAT)
    assert "static number of channels only" in str(without_standard_operator(dynamic)[0])
    assert not without_standard_operator(one("selective_scan"))
    assert not without_standard_operator(ir.from_onnx_text(ADD))


def test_a_refusal_ends_the_export(tmp_path: Path) -> None:
    import torch
    from torch import nn

    class Mixer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            OPS["rwkv7"].part("torch")
            y: torch.Tensor = torch.ops.isthmus.rwkv7(x, -x.abs(), x, x, x, x, num_heads=2)[0]
            return y

    with pytest.raises(UnsupportedError, match="removal key apart") as caught:
        pipeline.export((Mixer(), (torch.randn(1, 3, 8),)), "onnxruntime", tmp_path / "bundle", options={"ssm_op": "onnx27"})
    assert caught.value.exit_code == 4
    assert not (tmp_path / "bundle").exists()


def test_onnx_runtime_still_refuses_the_standard_convolution_of_dynamic_channels() -> None:
    """When this fails, drop the reason for it in targets/onnxruntime/support.py."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 27]> g (float[B,C,L] x, float[C,1,3] w) => (float[B,C,L] y, float[B,C,2] s)
        { y, s = CausalConvWithState(x, w) }"""
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="CausalConvWithState"):
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("ssm_op", SSM_OPS)
def test_a_model_without_our_operators_is_left_as_it_is(ssm_op: str) -> None:
    model = ir.from_onnx_text(ADD)
    before = str(model)
    assert write_ssm_op(model, ssm_op) == []  # type: ignore[arg-type]  # a string will do
    assert str(model) == before


def test_a_file_for_onnx_runtime_has_its_own_operators_as_bodies() -> None:
    op = OPS["linear_attention"]
    rng = np.random.Generator(np.random.PCG64(0))
    inputs = {name: rng.standard_normal((2, 5, 8)).astype(np.float32) for name in ("q", "k", "v")}
    form, attributes, _ = node_of(op, inputs, {"q_num_heads": 2, "kv_num_heads": 2, "update_rule": "linear"})
    model = one_node(op, form, attributes, ir.DataType.FLOAT)
    (plain,) = model.functions.values()
    assert "Scan" in [node.op_type for node in plain]
    write_ssm_op(model, "plugin")
    (body,) = model.functions.values()
    assert [(node.domain, node.op_type) for node in body if node.domain] == [("com.microsoft", "LinearAttention")]
    assert model.opset_imports["com.microsoft"] == 1
