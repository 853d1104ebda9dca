"""Reductions, products and normalisations; see `operations.py`."""

import numpy as np
import torch
import torch.nn.functional as F


def cases_of(given):
    """How each operation is built, what it is in torch, and on which inputs, by its name."""
    mb, normal = given.mb, given.normal
    X, POSITIVE, IMAGE, INTEGERS = given.X, given.POSITIVE, given.IMAGE, given.INTEGERS
    return {
        # reductions
        "reduce_sum": (lambda x: mb.reduce_sum(x=x, axes=[0, -1]), lambda x: x.sum((0, 2)), X),
        "reduce_mean": (lambda x: mb.reduce_mean(x=x, axes=[1], keep_dims=True), lambda x: x.mean(1, keepdim=True), X),
        "reduce_max": (lambda x: mb.reduce_max(x=x, axes=[1, 2]), lambda x: x.amax((1, 2)), X),
        "reduce_min": (lambda x: mb.reduce_min(x=x, axes=[1]), lambda x: x.amin(1), X),
        "reduce_prod": (lambda x: mb.reduce_prod(x=x, axes=[1]), lambda x: x.prod(1), X),
        "reduce_l1_norm": (lambda x: mb.reduce_l1_norm(x=x, axes=[1]), lambda x: x.abs().sum(1), X),
        "reduce_l2_norm": (lambda x: mb.reduce_l2_norm(x=x, axes=[1]), lambda x: x.norm(dim=1), X),
        "reduce_sum_square": (lambda x: mb.reduce_sum_square(x=x, axes=[1]), lambda x: (x * x).sum(1), X),
        "reduce_log_sum": (lambda x: mb.reduce_log_sum(x=x, axes=[1]), lambda x: x.sum(1).log(), POSITIVE),
        "reduce_log_sum_exp": (lambda x: mb.reduce_log_sum_exp(x=x, axes=[1]), lambda x: x.logsumexp(1), 60 * X),
        "reduce_argmax": (lambda x: mb.reduce_argmax(x=x, axis=1), lambda x: x.argmax(1), X),
        "reduce_argmin": (lambda x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True), lambda x: x.argmin(-1, keepdim=True), X),
        "cumsum": (lambda x: mb.cumsum(x=x, axis=1), lambda x: x.cumsum(1), X),
        "cumsum, exclusive and reverse": (
            lambda x: mb.cumsum(x=x, axis=1, exclusive=True, reverse=True),
            lambda x: x.flip(1).cumsum(1).flip(1) - x,
            X,
        ),
        "argsort": (lambda x: mb.argsort(x=x, axis=1, ascending=True), lambda x: x.argsort(1), X),
        "topk": (lambda x: mb.topk(x=x, k=2, axis=1), lambda x: x.topk(2, 1), X),
        "topk, ascending": (lambda x: mb.topk(x=x, k=2, axis=-1, ascending=True), lambda x: x.topk(2, -1, largest=False), X),
        "softmax": (lambda x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1), 50 * X),
        "non_zero": (lambda x: mb.non_zero(x=x), torch.nonzero, INTEGERS),
        # products
        "matmul": (lambda x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True), lambda x, y: x.mT @ y.mT, X, normal(5, 3)),
        "linear": (
            lambda x: mb.linear(x=x, weight=normal(6, 4), bias=normal(6)),
            lambda x: F.linear(x, torch.from_numpy(normal(6, 4)), torch.from_numpy(normal(6))),
            X,
        ),
        "einsum": (
            lambda x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
            lambda x, y: torch.einsum("nchw,nwhu->nchu", x, y),
            normal(2, 3, 4, 5),
            normal(2, 5, 4, 6),
        ),
        "scaled_dot_product_attention": (
            lambda q, k, m: mb.scaled_dot_product_attention(query=q, key=k, value=k, attn_mask=m),
            lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=m),
            normal(2, 3, 4, 8),
            normal(2, 3, 5, 8, seed=7),
            normal(4, 5) > -1,
        ),
        # normalisations
        "layer_norm": (
            lambda x: mb.layer_norm(x=x, axes=[2], gamma=normal(4), beta=normal(4, seed=1), epsilon=1e-3),
            lambda x: F.layer_norm(x, (4,), torch.from_numpy(normal(4)), torch.from_numpy(normal(4, seed=1)), 1e-3),
            X,
        ),
        "instance_norm": (
            lambda x: mb.instance_norm(x=x, gamma=normal(4), beta=normal(4, seed=1), epsilon=1e-3),
            lambda x: F.instance_norm(x, weight=torch.from_numpy(normal(4)), bias=torch.from_numpy(normal(4, seed=1)), eps=1e-3),
            IMAGE,
        ),
        "batch_norm": (
            lambda x: mb.batch_norm(x=x, mean=normal(4), variance=np.abs(normal(4)), gamma=normal(4), beta=normal(4, seed=1), epsilon=1e-3),
            lambda x: F.batch_norm(
                x,
                torch.from_numpy(normal(4)),
                torch.from_numpy(np.abs(normal(4))),
                torch.from_numpy(normal(4)),
                torch.from_numpy(normal(4, seed=1)),
                eps=1e-3,
            ),
            IMAGE,
        ),
        "l2_norm": (
            lambda x: mb.l2_norm(x=x, epsilon=1e-3),
            lambda x: x / (x.square().sum((-3, -2, -1), keepdim=True) + 1e-3).sqrt(),
            IMAGE,
        ),
    }
