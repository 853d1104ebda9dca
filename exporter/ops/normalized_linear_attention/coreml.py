"""The Core ML lowering of normalised linear attention, scaled so that float16 holds its sums and its epsilon.

y does not change when the features of a query, or those of all keys of a head, are multiplied by a number, if epsilon is multiplied too.
The features of each query are divided by their peak, those of the keys by the peak of the head, and the values by the peak of their
channel, which y is multiplied by in the end; half of the bits of the number of keys are taken from the keys' features beforehand. With at
most K channels and T keys no sum exceeds K sqrt(2 T), and none of the factors comes near float16's smallest number.

Epsilon becomes (sqrt(eps) / peak of q) (sqrt(eps) / peak of k): 1e-15 is no float16 number (coremltools replaces it by 6e-8, the
smallest), its root 3e-8 nearly is. Where the normaliser is nevertheless exactly 0, no query meets any key and the numerator is 0 as well:
it is divided by 1.

A float32 island would need none of this, and cannot be made from inside a lowering (see `mil`). In float16 y reaches 66 to 72 dB, with
float32 around it (`mil.float16_around`) 77 dB.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...op import OPS
from ..mil import Var, mb, register_lowering, sizes

_LARGEST = 60000.0  # near float16's largest number


def _lower(inputs: dict[str, Var], attributes: dict[str, Any]) -> tuple[Var]:
    heads = attributes["num_heads"]
    q, k, v = (_heads(inputs[name], heads) for name in ("q", "k", "v"))  # (batch, heads, tokens, width)
    batch, _, keys, _ = sizes(k)
    length, value = sizes(q)[2], sizes(v)[3]
    q, k = mb.relu(x=q), mb.relu(x=k)
    q_peak = _or_one(mb.reduce_max(x=q, axes=[3], keep_dims=True))
    k_peak = _or_one(mb.reduce_max(x=k, axes=[2, 3], keep_dims=True))
    v_peak = _or_one(mb.reduce_max(x=mb.abs(x=v), axes=[2], keep_dims=True))
    spared = 2.0 ** -(math.ceil(math.log2(keys)) // 2)
    q, v = mb.real_div(x=q, y=q_peak), mb.real_div(x=v, y=v_peak)
    k = mb.mul(x=mb.real_div(x=k, y=k_peak), y=spared)

    # The sums of the keys are the product with one more value channel, of ones.
    ones = np.ones((1, 1, 1, keys), np.float32)
    summed = mb.matmul(x=k, y=v, transpose_x=True)
    total = mb.matmul(x=k, y=ones, transpose_x=True, transpose_y=True)
    root = attributes["eps"] ** 0.5
    eps_q = mb.minimum(x=mb.real_div(x=root, y=q_peak), y=_LARGEST)
    eps_k = mb.minimum(x=mb.real_div(x=root * spared, y=k_peak), y=_LARGEST)
    eps = mb.minimum(x=mb.mul(x=eps_q, y=eps_k), y=_LARGEST)
    normaliser = _or_one(mb.add(x=mb.matmul(x=q, y=total), y=eps))
    y = mb.mul(x=mb.real_div(x=mb.matmul(x=q, y=summed), y=normaliser), y=v_peak)
    return (mb.reshape(x=mb.transpose(x=y, perm=[0, 2, 1, 3]), shape=[batch, length, heads * value]),)


def _or_one(x: Var) -> Var:
    """Numbers that are at least 0, with 1 in place of 0."""
    return mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=1.0)


def _heads(x: Var, heads: int) -> Var:
    batch, tokens, width = sizes(x)
    return mb.transpose(x=mb.reshape(x=x, shape=[batch, tokens, heads, width // heads]), perm=[0, 2, 1, 3])


register_lowering(OPS["normalized_linear_attention"], _lower)
