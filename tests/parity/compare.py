"""What the comparisons share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

torch.set_num_threads(1)  # models this small gain nothing from more, and lose much where other work runs beside

BOUND = 1e-5
"""On max |difference| / (max(reference) - min(reference)), float32. Single sums in another order give some 1e-6."""


def fill_zeros(module: nn.Module, seed: int) -> nn.Module:
    """Gives every all-zero parameter 0.05 * randn, so that no gate hides what lies behind it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def draw(spec, seed: int, **sizes: int) -> dict[str, Tensor]:
    return spec.inputs(np.random.Generator(np.random.PCG64(seed)), {**spec.sizes, **sizes})


def assert_close(got: Tensor, reference: Tensor) -> None:
    assert got.shape == reference.shape
    assert got.dtype == reference.dtype == torch.float32
    spread = (reference.max() - reference.min()).item()
    assert spread > 0.1, "an output that hardly varies shows nothing"
    error = (got.double() - reference.double()).abs().max().item() / spread
    assert error <= BOUND
