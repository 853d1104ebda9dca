"""Normalised linear attention for Core AI: two matrix products a head, all in float32.

It needs no loop. An epsilon of 1e-15 is 0 in float16, and sums over many tokens leave its range: products, sums and the quotient are
float32, which Core AI's CPU executes as such. A column of ones beside the values makes the normaliser the last column of the products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def decompose(inputs: dict[str, Tensor], attributes: dict[str, Any]) -> tuple[Tensor, ...]:
    """The operator in ATen operators; see `exporter.ops.coreai_table`."""
    heads, dtype = attributes["num_heads"], inputs["q"].dtype
    batch, length = inputs["q"].shape[:2]
    q, k, v = (
        x.float().reshape(batch, x.shape[1], heads, x.shape[2] // heads).transpose(1, 2).flatten(0, 1)
        for x in (inputs[name] for name in ("q", "k", "v"))
    )
    ones = F.pad(v, (0, 1), value=1.0)
    sums = torch.bmm(q.relu(), torch.bmm(k.relu().transpose(1, 2), ones))
    y = sums[:, :, :-1] / (sums[:, :, -1:] + attributes["eps"])
    y = y.reshape(batch, heads, length, v.shape[2]).transpose(1, 2).reshape(batch, length, heads * v.shape[2])
    return (y.to(dtype),)
