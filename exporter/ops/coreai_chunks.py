"""A loop over chunks of tokens, for Core AI: the graph's size does not depend on the length, nor the memory for states.

Within a chunk, tokens are computed together; the state goes from chunk to chunk through `while_loop`, which Core AI executes as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Sequence[Tensor], Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]]
"""From a chunk of each sequence (batch, tokens, width), the state before it and the constants, to the outputs of the chunk (batch, tokens,
width) and the state after it, float32. Tokens of zeros, which fill the last chunk, must leave the state as it is. It may not close over
tensors: coreai-torch 0.4.3 passes over those that a loop's body refers to."""


def scan_chunks(
    step: Step, sequences: Sequence[Tensor], state: Tensor, constants: Sequence[Tensor], *, size: int, width: int | torch.SymInt
) -> tuple[Tensor, Tensor]:
    """Computes a sequence chunk by chunk.

    Args:
        step: Computes one chunk.
        sequences: What is cut into chunks (batch, length, width of its own).
        state: The state before the first token, float32.
        constants: What every chunk needs.
        size: Tokens in a chunk.
        width: Width of the outputs.

    Returns:
        The outputs (batch, length, width) in the dtype of the first sequence, and the last state.
    """
    first = sequences[0]
    batch, length = first.shape[:2]
    if isinstance(length, int) and length <= size:
        y, last = step(sequences, state, constants)
        return y.to(first.dtype), last
    chunks = (length + size - 1) // size
    if not isinstance(length, int) or length % size:
        # coreai-torch 0.4.3 pads by numbers only, not by what depends on the length.
        sequences = [F.pad(x, (0, 0, 0, size - 1))[:, : chunks * size] for x in sequences]
    cut = [x.reshape(batch, chunks, size, x.shape[2]) for x in sequences]
    count = len(cut)

    def unfinished(i: Tensor, state: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
        return i < y.shape[1]

    def body(i: Tensor, state: Tensor, y: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = i.view(1)
        chunk = [x.index_select(1, at).squeeze(1) for x in rest[:count]]
        out, last = step(chunk, state, rest[count:])
        y = y.scatter(1, i.view(1, 1, 1, 1).expand(y.shape[0], 1, *y.shape[2:]), out.to(y.dtype).unsqueeze(1))
        # What a loop carries must keep its strides from turn to turn.
        return i + 1, last.clone(memory_format=torch.contiguous_format), y

    start = torch.zeros((), dtype=torch.int64, device=first.device)
    y = first.new_zeros(batch, chunks, size, width)
    _, last, y = torch.ops.higher_order.while_loop(unfinished, body, (start, state, y), (*cut, *constants))
    return y.reshape(batch, chunks * size, width)[:, :length], last
