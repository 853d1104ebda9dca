"""Translation to ONNX: opsets, epsilons, refusals, and the check of a written file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from isthmus.exporter import onnx as onnx_files
from isthmus.exporter.errors import IsthmusError, UnsupportedError
from isthmus.exporter.passes import optimise
from isthmus.exporter.trace import trace


class Normalised(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.sum(-1, keepdim=True) + 1e-15)


class Named(nn.Module):
    """A buffer with the name that torch gives to a result."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos", torch.tensor([1.0, 2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cos(x) + self.cos


class Untranslatable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_y0(x) + torch.linalg.eigvals(x).real


def translate(module: nn.Module, x: torch.Tensor, opset: int) -> ir.Model:
    program = trace(module, {"x": x})
    return optimise(onnx_files.to_onnx(program, opset=opset, input_names=["x"], output_names=["y"]))


def test_a_weight_and_a_result_of_one_name_are_told_apart() -> None:
    x = torch.tensor([[0.5, -1.0]])
    program = trace(Named(), {"x": x})
    model = onnx_files.to_onnx(program, opset=20, input_names=["x"], output_names=["y"])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert "cos" in model.graph.initializers
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], torch.cos(x) + torch.tensor([1.0, 2.0]), atol=1e-6)


@pytest.mark.parametrize("opset", sorted(onnx_files.OPSETS))
def test_the_opset_asked_for_is_written_and_a_tiny_epsilon_survives(opset: int, tmp_path: Path) -> None:
    model = translate(Normalised(), torch.zeros(2, 4), opset)
    path = tmp_path / "model.onnx"
    onnx_files.save(model, path, bytes_of_weights=0)
    onnx_files.check(path, opset=opset)
    assert {e.domain: e.version for e in onnx.load(path).opset_import}[""] == opset
    y = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": np.zeros((2, 4), np.float32)})[0]
    np.testing.assert_array_equal(y, 0)  # 0 / 1e-15; without the epsilon it is NaN


def test_every_untranslatable_operator_is_named() -> None:
    with pytest.raises(UnsupportedError) as caught:
        translate(Untranslatable(), torch.randn(3, 3), 23)
    text = str(caught.value)
    assert "bessel_y0" in text
    assert "linalg_eig" in text


def test_a_file_of_another_opset_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx_files.save(translate(Normalised(), torch.ones(2, 4), 20), path, bytes_of_weights=0)
    with pytest.raises(IsthmusError, match="has opset 20, expected 23"):
        onnx_files.check(path, opset=23)


def test_an_invalid_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23]> g (float[2,3] x) => (float[2] y) { y = Squeeze(x) }')
    model.graph[0].op_type = "NoSuchOperator"
    onnx_files.save(model, path, bytes_of_weights=0)
    with pytest.raises(IsthmusError, match="NoSuchOperator"):
        onnx_files.check(path, opset=23)


def test_large_weights_go_to_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "EXTERNAL_DATA_BYTES", 1024)
    torch.manual_seed(0)
    module = nn.Linear(64, 64).eval()
    x = torch.randn(2, 64)
    path = tmp_path / "model.onnx"
    onnx_files.save(translate(module, x, 23), path, bytes_of_weights=64 * 65 * 4)
    onnx_files.check(path, opset=23)
    assert (tmp_path / "model.onnx.data").stat().st_size >= 64 * 64 * 4
    assert path.stat().st_size < 4096
    y = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(y, module(x).detach().numpy(), atol=1e-6)
