"""GPU kernels of the matrix recurrence that linear attention and RWKV-7 share, parallel over the chunks of the sequence.

The algebra is that of `recurrence`: for each batch and head, with the state S (key, value)::

    S_t = exp(g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    y_t = S_t^T q_t

Without removal (a, b) there are three passes. `chunk_states`: what each chunk alone adds to the state, and its total decay. `carry_states`:
the state before every chunk. `chunk_outputs`: queries times that state, and the products inside the chunk.

With removal, w_t = a_t^T S_{t-1} is affine in the state S_0 before the chunk, w = W S_0 + U. `chunk_inverses` inverts the unit triangular
system of each chunk, `chunk_solutions` computes W and U, `carry_corrected` goes over the chunks with two products each, and `chunk_outputs`
is as above. All but `carry_states` and `carry_corrected` are parallel over chunks; these two are parallel over the columns of the state.
`recurrent` does it all token by token: for single steps, short sequences and sizes that the others do not take.

Every exponent is a sum of decays over a stretch of tokens that is summed as it is, never a difference of two long sums: with decays of at
most 0 nothing overflows, nothing cancels, and a decay of minus infinity clears the state. Products of activations are tensor-core products
in their dtype. Products of float32 matrices, among them all that go into a state, are tensor-core products too: each factor is split into
two TF32 numbers, and the product of the two small parts is left out, which is 2^-22 of the product, less than sums of float32 lose. What
goes into y alone is split into two numbers of the activations' dtype, for float16 after division by a power of two, so that it stays in
range.

Queries, keys and values may be FP8 (e4m3), where there is no removal. Queries times keys are then FP8 products, unless there is a decay a
key channel, which scales them; where one factor is not FP8 the other becomes float16, which holds every number of e4m3. FP8 tensor cores of
compute capability 9.0 keep some 14 bits of a sum (DeepSeek-V3, arXiv:2412.19437, section 3.3.2): after every 32 products theirs is added to
one in float32, so that its error is some 2^-13 of the largest of 32 products. The interpreter sums in float32, and does not show it.

Names: C tokens a chunk, BK and BV blocks over key and value, T the dtype of the activations. DECAY is 0 without decay, 1 for one a head, 2
for one a key channel; where a kernel takes `gated`, 0 stands for a decay that is not there. Tensors of the node are (batch, length, heads *
width); reads, solutions and writes are (batch * heads, length, width).
"""

from __future__ import annotations

from .additive import carry_states, chunk_states
from .outputs import chunk_outputs
from .pairs import chunk_products
from .recurrent import recurrent
from .removal import carry_corrected, chunk_inverses, chunk_solutions

__all__ = [
    "carry_corrected",
    "carry_states",
    "chunk_inverses",
    "chunk_outputs",
    "chunk_products",
    "chunk_solutions",
    "chunk_states",
    "recurrent",
]
