"""The onnxruntime target: its sessions, its provider check, its mask pass and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from isthmus.exporter.errors import IsthmusError, MachineError
from isthmus.exporter.passes.expand_attention_mask import ExpandAttentionMask
from isthmus.exporter.target import TARGETS
from isthmus.targets.onnxruntime import OnnxRuntimeOptions
from isthmus.targets.onnxruntime.session import OnnxRuntimeRunner
from isthmus.targets.onnxruntime.support import unsupported

ADD = '<ir_version: 10, opset_import: ["" : 23]> g (float[N,3] x, float[3] y) => (float[N,3] z) { z = Add(x, y) }'


@pytest.fixture
def add(tmp_path: Path) -> Path:
    path = tmp_path / "add.onnx"
    ir.save(ir.from_onnx_text(ADD), path)
    return path


@pytest.mark.parametrize("optimization", ["disable", "basic", "extended", "all"])
def test_a_runner_executes_and_names_its_provider(add: Path, optimization: str) -> None:
    with OnnxRuntimeRunner(add, optimization=optimization, threads=1) as runner:  # type: ignore[arg-type]
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
