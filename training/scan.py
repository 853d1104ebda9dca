"""The selective scan and the convolution as training wants them: with gradients, which the exported operators do not have.

The scan is one pass over the tokens forwards and one backwards, with a gradient written by hand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Scan(torch.autograd.Function):
    # Tokens first and channels last, so that each step works on one block of memory: states are (B, N, d).

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        u, delta, B, C = (x.transpose(0, 1).contiguous() for x in (u, delta, B, C))
        A = A.t().contiguous()
        drive, y = delta * u, torch.empty_like(u)
        states = u.new_empty(u.shape[0], u.shape[1], *A.shape)
        state = torch.zeros_like(states[0])
        for i in range(len(u)):
            decay = torch.mul(delta[i].unsqueeze(1), A).exp_()
            state = torch.mul(decay, state, out=states[i])
            state.addcmul_(drive[i].unsqueeze(1), B[i].unsqueeze(2))
            torch.sum(state * C[i].unsqueeze(2), 1, out=y[i])
        ctx.save_for_backward(u, delta, A, B, C, states)
        return y.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        u, delta, A, B, C, states = ctx.saved_tensors
        grad_y = grads[0].transpose(0, 1).contiguous()
        drive = delta * u
        grad_drive, grad_delta = torch.empty_like(u), torch.zeros_like(delta)
        grad_A, grad_B, grad_C = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
        grad_state = torch.zeros_like(states[0])
        for i in reversed(range(len(u))):
            grad_state.addcmul_(grad_y[i].unsqueeze(1), C[i].unsqueeze(2))
            # Products and sums: the matrices are so thin that a batched matrix product is ten times slower.
            torch.sum(states[i] * grad_y[i].unsqueeze(1), 2, out=grad_C[i])
            torch.sum(grad_state * drive[i].unsqueeze(1), 2, out=grad_B[i])
            torch.sum(grad_state * B[i].unsqueeze(2), 1, out=grad_drive[i])
            grad_state.mul_(torch.mul(delta[i].unsqueeze(1), A).exp_())
            if i > 0:
                grad_exponent = grad_state * states[i - 1]
                grad_delta[i] = (grad_exponent * A).sum(1)
                grad_A += grad_exponent.mul_(delta[i].unsqueeze(1)).sum(0)
        grad_delta.addcmul_(grad_drive, u)
        grad_u = grad_drive.mul_(delta)
        return grad_u.transpose(0, 1), grad_delta.transpose(0, 1), grad_A.t(), grad_B.transpose(0, 1), grad_C.transpose(0, 1)


def sequential_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, *, reverse: bool) -> Tensor:
    """`isthmus.models.mamba.scan`, token by token, in the dtype of `u`, once differentiable. Shapes as there."""
    delta = F.softplus(delta + delta_bias)
    tokens = [x.flip(1) if reverse else x for x in (u, delta, B, C)]
    y: Tensor = _Scan.apply(tokens[0], tokens[1], A, tokens[2], tokens[3])  # type: ignore[no-untyped-call]  # untyped
    return (y.flip(1) if reverse else y) + u * D


def differentiable_convolution(x: Tensor, weight: Tensor, bias: Tensor, *, initial_state: Tensor | None) -> Tensor:
    """`isthmus.models.mamba.causal_convolution` by torch's own convolution. Shapes as there."""
    width = weight.shape[2]
    padded = F.pad(x, (width - 1, 0)) if initial_state is None else torch.cat([initial_state, x], dim=2)
    return F.silu(F.conv1d(padded, weight, bias, groups=x.shape[1]))
