"""Attention for compilers that make something else than zeros of a query that may read no key.

PyTorch gives zeros for such a row (`aten::_safe_softmax`, since torch 2.5). A softmax over nothing but minus infinity is not a number, and
one over a large negative constant is an average over the keys that were forbidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)


def guarded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **rest: Any,
) -> Any:
    """Attention whose rows without a key are put in order before it, and are zeros after it; for a table of decompositions.

    Given::

        y = scaled_dot_product_attention(q, k, v, mask)

    Result::

        some = mask.any(-1, keepdim=True)                             # mask > -inf where it is added
        z = scaled_dot_product_attention(q, k, v, mask or not some)      # where(some, mask, 0)
        y = where(some, z, 0)

    Args:
        query: (…, queries, width).
        key: (…, keys, width).
        value: (…, keys, width of the values).
        attn_mask: What a query may read, or what is added to its products; broadcasts with (…, queries, keys).
        dropout_p: As in PyTorch.
        is_causal: As in PyTorch. Every query reads the first key then.
        rest: The other keywords.

    Returns:
        The result, or `NotImplemented` where the call has no mask, and for the attention that this function itself calls.
    """
    if attn_mask is None or _INSIDE.get():
        return NotImplemented
    boolean = attn_mask.dtype == torch.bool
    some = (attn_mask if boolean else attn_mask > -torch.inf).any(-1, keepdim=True)
    mask = torch.logical_or(attn_mask, torch.logical_not(some)) if boolean else torch.where(some, attn_mask, torch.zeros_like(attn_mask))
    with _inside():
        result = torch.ops.aten.scaled_dot_product_attention.default(query, key, value, mask, dropout_p, is_causal, **rest)
    if some.dim() > 2 and result.transpose(-3, -2).is_contiguous():
        # `where` lays its result out like the condition, if that has heads; views behind it count on PyTorch's layout, tokens before heads.
        some = some.transpose(-3, -2).contiguous().transpose(-3, -2)
    return torch.where(some, result, torch.zeros_like(result))


@contextlib.contextmanager
def _inside() -> Iterator[None]:
    token = _INSIDE.set(True)
    try:
        yield
    finally:
        _INSIDE.reset(token)
