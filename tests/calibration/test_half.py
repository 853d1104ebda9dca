"""PyTorch rounded to half precision, against torch.autocast and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.calibration.half import module_peaks, run_rounded


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.outer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.norm(torch.nn.functional.gelu(self.inner(x))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_as_far_from_float32_as_autocast_is(net: Net, dtype: torch.dtype) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    program = torch.export.export(net, (x,))
    exact = net(x)
    with torch.autocast("cpu", dtype=dtype):
        autocast = net(x).float()
    ours = (run_rounded(program, (x,), dtype) - exact).square().mean().sqrt()
    theirs = (autocast - exact).square().mean().sqrt()
    assert 0.5 < float(ours / theirs) < 2.0


def test_a_single_linear_layer_is_rounded_where_it_should_be() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False).eval().requires_grad_(False)
    x = torch.randn(4, 8)
    expected = (x.half().double() @ layer.weight.half().double().T).float().half().float()
    got = run_rounded(torch.export.export(layer, (x,)), (x,), torch.float16)
    # The products are summed in float32 in another order, so a last bit of float16 may differ.
    torch.testing.assert_close(got, expected, rtol=2**-10, atol=0)


def test_kept_modules_are_exact(net: Net) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    program = torch.export.export(net, (x,))
    kept = run_rounded(program, (x,), torch.float16, keep_modules=["inner", "norm", "outer", ""])
    rounded = run_rounded(program, (x,), torch.float16)
    exact = net(x)
    assert (kept - exact).abs().max() < (rounded - exact).abs().max()


def test_peaks_are_those_of_what_modules_read_and_compute(net: Net) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    outputs, peaks = module_peaks(torch.export.export(net, (x,)), (x,))
    torch.testing.assert_close(outputs, net(x))
    assert peaks["inner"] == pytest.approx(max(float(x.abs().max()), float(net.inner(x).abs().max())))
    normal = net.norm(torch.nn.functional.gelu(net.inner(x)))
    assert peaks["outer"] == pytest.approx(max(float(normal.abs().max()), float(net(x).abs().max())))


def test_an_epsilon_that_the_dtype_cannot_hold_is_not_rounded_away() -> None:
    class Normalise(nn.Module):
        def forward(self, n: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
            return (n @ n) / (d @ d + 1e-15)

    zeros = torch.zeros(4, 4)
    result = run_rounded(torch.export.export(Normalise(), (zeros, zeros)), (zeros, zeros), torch.float16)
    assert torch.equal(result, zeros)
