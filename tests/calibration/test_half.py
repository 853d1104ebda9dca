"""PyTorch rounded to half precision, against torch.autocast and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.calibration.half import module_peaks, run_rounded
from isthmus.exporter.op import OPS


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


class Scanned(nn.Module):
    """A scan that forgets 1e-4 of its state a token: in float16 such a decay is 1."""

    def __init__(self) -> None:
        super().__init__()
        OPS["selective_scan"].part("torch")
        self.A = nn.Parameter(torch.full((2, 1), -0.0101))

    def forward(self, u: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = torch.ops.isthmus.selective_scan(u, torch.full_like(u, 0.01), self.A, b, b)
        return y, state


def test_an_operator_of_ours_rounds_its_activations_and_nothing_else() -> None:
    module = Scanned().eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    u, b = torch.rand(1, 512, 2, generator=g), torch.rand(1, 512, 1, generator=g)
    program = torch.export.export(module, (u, b))
    y, state = run_rounded(program, (u, b), torch.float16)
    half = torch.full_like(u, 0.01).half().float()
    # A is a parameter that the operator takes in float32: rounded to float16 it would be another number.
    assert module.A.half().float().ne(module.A).all()
    expected, last = torch.ops.isthmus.selective_scan(u.half().float(), half, module.A, b.half().float(), b.half().float())
    assert torch.equal(y, expected.half().float())
    assert torch.equal(state, last)
    kept, _ = run_rounded(program, (u, b), torch.float16, keep_modules=[""])
    assert torch.equal(kept, module(u, b)[0])
