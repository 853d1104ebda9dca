"""Calls of torch's operators with every keyword that image models give, by family: each is lowered to Core ML and compared with torch.

A call names the inputs of its family that it takes. The families are in `calls_*.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch


def rng(seed):
    return np.random.Generator(np.random.PCG64(seed))


def normal(*shape, seed=0):
    return torch.from_numpy(rng(seed).standard_normal(shape, dtype=np.float32))


def whole(low, high, *shape, seed=0):
    return torch.from_numpy(rng(seed).integers(low, high, shape, dtype=np.int32))


def changed(x, where, value):
    """A copy of x after `x[where] = value`."""
    x = x.clone()
    x[where] = value
    return x


@dataclass(frozen=True)
class Family:
    """Calls on the same inputs."""

    inputs: dict
    calls: dict
