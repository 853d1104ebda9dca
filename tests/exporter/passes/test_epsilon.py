"""Small epsilons survive: torch.onnx.export's own optimiser deletes `x + eps` for eps <= 1e-8, after which a row of zeros gives NaN."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from isthmus.exporter.onnx import to_onnx
from isthmus.exporter.passes import optimise
from isthmus.exporter.trace import trace


class Normalisations(nn.Module):
    """Every way of adding an epsilon that the models use: under a root, in a denominator, inside torch's own norms."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norm = nn.RMSNorm(8, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hand_written = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        ratio = x / (x.abs().sum(-1, keepdim=True) + self.eps)
        return self.norm(x) + hand_written + ratio


@functools.cache
def traced(eps: float) -> tuple[torch.export.ExportedProgram, torch.Tensor, np.ndarray]:
    """The program, its input, and what torch computes."""
    module = Normalisations(eps).eval()
    x = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).standard_normal((3, 8)).astype(np.float32))
    x[1] = 0.0
    x[2] *= 1e-6  # here the epsilon decides the result
    with torch.no_grad():
        return trace(module, {"x": x}), x, module(x).numpy()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("opset", range(20, 26))
@pytest.mark.parametrize("eps", [1e-15, 1e-8])
def test_epsilon_survives(eps: float, opset: int, fuse: bool) -> None:
    program, x, want = traced(eps)
    model = optimise(to_onnx(program, opset=opset, input_names=["x"], output_names=["y"]), fuse=fuse)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert model.opset_imports[""] == opset
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x.numpy()})
    assert np.isfinite(got).all()
    for row in range(3):
        np.testing.assert_allclose(got[row], want[row], rtol=1e-5, atol=1e-7)
