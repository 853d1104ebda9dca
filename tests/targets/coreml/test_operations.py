"""Every operation of the interpreter against torch, and compressed weights against the examples of MIL's documentation."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from isthmus.exporter.quiet import quiet
from isthmus.targets.coreml.interpreter import OPERATIONS, Interpreter

with quiet("coremltools"):  # it reports on import that it was not tested with this torch, and that no Core ML is here
    from coremltools.converters.mil import Builder

mb = Builder


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def normal(*shape, seed=0):
    return rng(seed).standard_normal(shape, dtype=np.float32)


X = normal(2, 3, 4)
POSITIVE = np.abs(X) + np.float32(0.1)
UNIT = np.tanh(X)
IMAGE = normal(2, 4, 7, 9)
INTEGERS = rng(1).integers(-9, 9, (2, 3, 4), dtype=np.int32)
NONZERO = np.where(INTEGERS == 0, 3, INTEGERS).astype(np.int32)
TRUTH = X > 0
KERNEL = normal(6, 2, 3, 3, seed=2)
TRANSPOSED = normal(4, 3, 3, 3, seed=3)
PLACES = np.array([2, 0, -1], np.int32)
ALONG = rng(4).integers(0, 4, (2, 3, 5), dtype=np.int32)
SQUARE = normal(2, 5, 5)
POOL = {"kernel_sizes": [3, 2], "strides": [2, 2]}

PADDING = {  # what torch's reflection is called where the corners are the edges of pixels
    **{(padding, corners): name for padding, name in (("zeros", "constant"), ("border", "border")) for corners in (False, True)},
    ("reflection", True): "reflection",
    ("reflection", False): "symmetric",
}

# name of the operation: how it is built, what it is in torch, on which inputs.
CASES = {
    "abs": (lambda x: mb.abs(x=x), torch.abs, X),
    "acos": (lambda x: mb.acos(x=x), torch.acos, UNIT),
    "asin": (lambda x: mb.asin(x=x), torch.asin, UNIT),
    "atan": (lambda x: mb.atan(x=x), torch.atan, X),
    "atanh": (lambda x: mb.atanh(x=x), torch.atanh, UNIT),
    "ceil": (lambda x: mb.ceil(x=x), torch.ceil, X),
    "cos": (lambda x: mb.cos(x=x), torch.cos, X),
    "cosh": (lambda x: mb.cosh(x=x), torch.cosh, X),
    "erf": (lambda x: mb.erf(x=x), torch.erf, X),
    "exp": (lambda x: mb.exp(x=x), torch.exp, X),
    "exp2": (lambda x: mb.exp2(x=x), torch.exp2, X),
    "floor": (lambda x: mb.floor(x=x), torch.floor, X),
    "identity": (lambda x: mb.identity(x=x), lambda x: x, X),
    "inverse": (lambda x: mb.inverse(x=x, epsilon=1e-2), lambda x: 1 / (x + 1e-2), POSITIVE),
    "log": (lambda x: mb.log(x=x, epsilon=1e-2), lambda x: torch.log(x + 1e-2), POSITIVE),
    "logical_not": (lambda x: mb.logical_not(x=x), torch.logical_not, TRUTH),
    "round": (lambda x: mb.round(x=x), torch.round, X),
    "rsqrt": (lambda x: mb.rsqrt(x=x, epsilon=1e-2), lambda x: torch.rsqrt(x + 1e-2), POSITIVE),
    "sign": (lambda x: mb.sign(x=x), torch.sign, X),
    "sin": (lambda x: mb.sin(x=x), torch.sin, X),
    "sinh": (lambda x: mb.sinh(x=x), torch.sinh, X),
    "sqrt": (lambda x: mb.sqrt(x=x), torch.sqrt, POSITIVE),
    "square": (lambda x: mb.square(x=x), torch.square, X),
    "tan": (lambda x: mb.tan(x=x), torch.tan, UNIT),
    "tanh": (lambda x: mb.tanh(x=x), torch.tanh, X),
    "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=0.7), lambda x: x.clamp(-0.5, 0.7), X),
    "threshold": (lambda x: mb.threshold(x=x, alpha=0.2), lambda x: x.clamp(min=0.2), X),
    "cast": (lambda x: mb.cast(x=x, dtype="int32"), lambda x: x.int(), 3 * X),
    # activations
    "clamped_relu": (lambda x: mb.clamped_relu(x=x, alpha=0.1, beta=0.5), lambda x: F.leaky_relu(x, 0.1).clamp(max=0.5), X),
    "elu": (lambda x: mb.elu(x=x, alpha=0.7), lambda x: F.elu(x, 0.7), X),
    "gelu": (lambda x: mb.gelu(x=x, mode="EXACT"), F.gelu, X),
    "gelu, tanh": (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh"), X),
    "gelu, sigmoid": (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda x: x * torch.sigmoid(1.702 * x), X),
    "leaky_relu": (lambda x: mb.leaky_relu(x=x, alpha=0.1), lambda x: F.leaky_relu(x, 0.1), X),
    "linear_activation": (lambda x: mb.linear_activation(x=x, alpha=2.0, beta=0.3), lambda x: 2 * x + 0.3, X),
    "prelu": (
        lambda x: mb.prelu(x=x, alpha=np.float32([0.1, 0.2, 0.3, 0.4])),
        lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3, 0.4])),
        IMAGE,
    ),
    "relu": (lambda x: mb.relu(x=x), F.relu, X),
    "relu6": (lambda x: mb.relu6(x=x), F.relu6, 5 * X),
    "scaled_tanh": (lambda x: mb.scaled_tanh(x=x, alpha=2.0, beta=0.3), lambda x: 2 * torch.tanh(0.3 * x), X),
    "sigmoid": (lambda x: mb.sigmoid(x=x), torch.sigmoid, 50 * X),
    "sigmoid_hard": (lambda x: mb.sigmoid_hard(x=x, alpha=0.2, beta=0.5), lambda x: (0.2 * x + 0.5).clamp(0, 1), 3 * X),
    "silu": (lambda x: mb.silu(x=x), F.silu, 50 * X),
    "softplus": (lambda x: mb.softplus(x=x), lambda x: F.softplus(x, threshold=1e9), 30 * X),
    "softplus_parametric": (
        lambda x: mb.softplus_parametric(x=x, alpha=np.float32([1, 2, 3]), beta=np.float32([1, 0.5, 2])),
        lambda x: torch.tensor([[1.0], [2], [3]]) * F.softplus(torch.tensor([[1.0], [0.5], [2]]) * x),
        X,
    ),
    "softsign": (lambda x: mb.softsign(x=x), F.softsign, X),
    "thresholded_relu": (lambda x: mb.thresholded_relu(x=x, alpha=0.3), lambda x: torch.where(x >= 0.3, x, 0.0), X),
    # two operands
    "add": (lambda x, y: mb.add(x=x, y=y), torch.add, X, normal(1, 3, 1, seed=5)),
    "sub": (lambda x, y: mb.sub(x=x, y=y), torch.sub, X, normal(4, seed=5)),
    "mul": (lambda x, y: mb.mul(x=x, y=y), torch.mul, X, normal(4, seed=5)),
    "maximum": (lambda x, y: mb.maximum(x=x, y=y), torch.maximum, X, normal(4, seed=5)),
    "minimum": (lambda x, y: mb.minimum(x=x, y=y), torch.minimum, X, normal(4, seed=5)),
    "pow": (lambda x, y: mb.pow(x=x, y=y), torch.pow, POSITIVE, normal(4, seed=5)),
    "mod": (lambda x, y: mb.mod(x=x, y=y), torch.remainder, INTEGERS, NONZERO),
    "floor_div": (lambda x, y: mb.floor_div(x=x, y=y), torch.floor_divide, INTEGERS, NONZERO),
    "real_div": (lambda x, y: mb.real_div(x=x, y=y), torch.div, X, POSITIVE),
    "real_div, integers": (
        lambda x, y: mb.real_div(x=x, y=y),
        lambda x, y: torch.div(x, y, rounding_mode="trunc"),
        INTEGERS,
        NONZERO,
    ),
    "equal": (lambda x, y: mb.equal(x=x, y=y), torch.eq, INTEGERS, INTEGERS[:, :, ::-1].copy()),
    "not_equal": (lambda x, y: mb.not_equal(x=x, y=y), torch.ne, INTEGERS, INTEGERS[:, :, ::-1].copy()),
    "greater": (lambda x, y: mb.greater(x=x, y=y), torch.gt, INTEGERS, INTEGERS[:, :, ::-1].copy()),
    "greater_equal": (lambda x, y: mb.greater_equal(x=x, y=y), torch.ge, INTEGERS, INTEGERS[:, :, ::-1].copy()),
    "less": (lambda x, y: mb.less(x=x, y=y), torch.lt, INTEGERS, INTEGERS[:, :, ::-1].copy()),
    "less_equal": (lambda x, y: mb.less_equal(x=x, y=y), torch.le, INTEGERS, INTEGERS[:, :, ::-1].copy()),
    "logical_and": (lambda x, y: mb.logical_and(x=x, y=y), torch.logical_and, TRUTH, UNIT < 0.3),
    "logical_or": (lambda x, y: mb.logical_or(x=x, y=y), torch.logical_or, TRUTH, UNIT < 0.3),
    "logical_xor": (lambda x, y: mb.logical_xor(x=x, y=y), torch.logical_xor, TRUTH, UNIT < 0.3),
    "select": (lambda c, x, y: mb.select(cond=c, a=x, b=y), torch.where, TRUTH, X, -2 * X),
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
    # shapes
    "reshape": (lambda x: mb.reshape(x=x, shape=[0, -1, 6]), lambda x: x.reshape(2, -1, 6), X),
    "transpose": (lambda x: mb.transpose(x=x, perm=[2, 0, 1]), lambda x: x.permute(2, 0, 1), X),
    "expand_dims": (lambda x: mb.expand_dims(x=x, axes=[0, -1]), lambda x: x[None, ..., None], X),
    "squeeze": (lambda x: mb.squeeze(x=x, axes=[0]), lambda x: x.squeeze(0), X[:1]),
    "flatten2d": (lambda x: mb.flatten2d(x=x, axis=2), lambda x: x.reshape(6, 4), X),
    "concat": (lambda x, y: mb.concat(values=[x, y], axis=1), lambda x, y: torch.cat([x, y], 1), X, normal(2, 5, 4)),
    "concat, interleaved": (
        lambda x, y: mb.concat(values=[x, y], axis=1, interleave=True),
        lambda x, y: torch.stack([x, y], 2).flatten(1, 2),
        X,
        -X,
    ),
    "stack": (lambda x, y: mb.stack(values=[x, y], axis=1), lambda x, y: torch.stack([x, y], 1), X, -X),
    "split": (lambda x: mb.split(x=x, num_splits=2, axis=2), lambda x: x.split(2, 2), X),
    "split, sizes": (lambda x: mb.split(x=x, split_sizes=[1, 3], axis=2), lambda x: x.split([1, 3], 2), X),
    "tile": (lambda x: mb.tile(x=x, reps=[1, 2, 3]), lambda x: x.repeat(1, 2, 3), X),
    "reverse": (lambda x: mb.reverse(x=x, axes=[0, 2]), lambda x: x.flip(0, 2), X),
    "pad": (lambda x: mb.pad(x=x, pad=[1, 2, 0, 3], constant_val=0.5), lambda x: F.pad(x, (0, 3, 1, 2), value=0.5), X),
    "pad, reflect": (lambda x: mb.pad(x=x, pad=[1, 2], mode="reflect"), lambda x: F.pad(x, (1, 2), mode="reflect"), X),
    "pad, replicate": (lambda x: mb.pad(x=x, pad=[1, 2], mode="replicate"), lambda x: F.pad(x, (1, 2), mode="replicate"), X),
    "fill_like": (lambda x: mb.fill_like(ref_tensor=x, value=2.5), lambda x: torch.full_like(x, 2.5), X),
    "band_part": (lambda x: mb.band_part(x=x, lower=1, upper=0), lambda x: x.tril().triu(-1), SQUARE),
    "one_hot": (
        lambda i: mb.one_hot(indices=i, one_hot_vector_size=4, axis=1, on_value=2.0, off_value=-1.0),
        lambda i: 3.0 * F.one_hot(i.long(), 4).movedim(-1, 1) - 1,
        ALONG,
    ),
    "pixel_shuffle": (lambda x: mb.pixel_shuffle(x=x, upscale_factor=2), lambda x: F.pixel_shuffle(x, 2), IMAGE),
    "pixel_unshuffle": (
        lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
        lambda x: F.pixel_unshuffle(x, 2),
        normal(2, 3, 4, 6),
    ),
    "crop": (lambda x: mb.crop(x=x, crop_height=[1, 2], crop_width=[3, 0]), lambda x: x[..., 1:-2, 3:], IMAGE),
    "sliding_windows": (lambda x: mb.sliding_windows(x=x, axis=1, size=2, stride=3), lambda x: x.unfold(1, 2, 3).movedim(-1, 2), SQUARE),
    # parts of tensors
    "slice_by_index": (
        lambda x: mb.slice_by_index(x=x, begin=[0, 2, 3], end=[2, 0, 1], stride=[1, -1, -2], begin_mask=[True, False, False]),
        lambda x: x.flip(1, 2)[:, :2, ::2][:, :, :1],
        X,
    ),
    "slice_by_index, squeezed": (
        lambda x: mb.slice_by_index(x=x, begin=[1, -2, 0], end=[2, 0, 3], end_mask=[False, True, False], squeeze_mask=[True, False, False]),
        lambda x: x[1, -2:, :3],
        X,
    ),
    "slice_by_size": (lambda x: mb.slice_by_size(x=x, begin=[0, 1, 1], size=[2, 2, -1]), lambda x: x[:, 1:3, 1:], X),
    "slice_update": (
        lambda x, y: mb.slice_update(x=x, update=y, begin=[0, 1, 0], end=[2, 3, 4], stride=[1, 1, 2]),
        lambda x, y: torch.stack([*x.unbind()]).index_put(
            (torch.tensor([[[0]], [[1]]]), torch.tensor([[1], [2]]), torch.tensor([0, 2])), y
        ),
        X,
        normal(2, 2, 2),
    ),
    "gather": (lambda x, i: mb.gather(x=x, indices=i, axis=2), lambda x, i: x[:, :, i.long()], X, PLACES),
    "gather, batched": (
        lambda x, i: mb.gather(x=x, indices=i, axis=1, batch_dims=1),
        lambda x, i: torch.stack([x[n][i[n].long()] for n in range(2)]),
        X,
        np.array([[0, 2], [1, -1]], np.int32),
    ),
    "gather_along_axis": (
        lambda x, i: mb.gather_along_axis(x=x, indices=i, axis=2),
        lambda x, i: x.gather(2, i.long()),
        X,
        ALONG,
    ),
    "gather_nd": (
        lambda x, i: mb.gather_nd(x=x, indices=i),
        lambda x, i: x[i[:, 0].long(), i[:, 1].long()],
        X,
        np.array([[0, 2], [1, -1]], np.int32),
    ),
    "gather_nd, batched": (
        lambda x, i: mb.gather_nd(x=x, indices=i, batch_dims=1),
        lambda x, i: torch.stack([x[n][i[n, :, 0].long()] for n in range(2)]),
        X,
        np.array([[[0], [2]], [[1], [-1]]], np.int32),
    ),
    "scatter": (
        lambda x, y: mb.scatter(data=x, indices=np.int32([3, 0]), updates=y, axis=2, mode="add"),
        lambda x, y: x.index_add(2, torch.tensor([3, 0]), y),
        X,
        normal(2, 3, 2),
    ),
    "scatter, update": (
        lambda x, y: mb.scatter(data=x, indices=np.int32([3, 0]), updates=y, axis=2, mode="update"),
        lambda x, y: x.index_copy(2, torch.tensor([3, 0]), y),
        X,
        normal(2, 3, 2),
    ),
    "scatter_along_axis": (
        lambda x, i, y: mb.scatter_along_axis(data=x, indices=i, updates=y, axis=2, mode="max"),
        lambda x, i, y: x.scatter_reduce(2, i.long(), y, "amax"),
        X,
        ALONG,
        normal(2, 3, 5, seed=6),
    ),
    "scatter_nd": (
        lambda x, y: mb.scatter_nd(data=x, indices=np.int32([[0, 1], [1, 2]]), updates=y, mode="add"),
        lambda x, y: x.index_put((torch.tensor([0, 1]), torch.tensor([1, 2])), y, accumulate=True),
        X,
        normal(2, 4),
    ),
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
    # convolutions
    "conv": (
        lambda x: mb.conv(
            x=x, weight=KERNEL, bias=normal(6), strides=[2, 1], pad_type="custom", pad=[1, 2, 0, 3], dilations=[1, 2], groups=2
        ),
        lambda x: F.conv2d(F.pad(x, (0, 3, 1, 2)), torch.from_numpy(KERNEL), torch.from_numpy(normal(6)), (2, 1), 0, (1, 2), 2),
        IMAGE,
    ),
    "conv, same": (
        lambda x: mb.conv(x=x, weight=KERNEL, pad_type="same", groups=2),
        lambda x: F.conv2d(x, torch.from_numpy(KERNEL), padding="same", groups=2),
        IMAGE,
    ),
    "conv, one axis": (
        lambda x: mb.conv(x=x, weight=normal(3, 1, 2), groups=3),
        lambda x: F.conv1d(x, torch.from_numpy(normal(3, 1, 2)), groups=3),
        X,
    ),
    "conv_transpose": (
        lambda x: mb.conv_transpose(
            x=x, weight=TRANSPOSED, strides=[2, 3], pad_type="custom", pad=[1, 1, 0, 0], bias=normal(6), groups=2, dilations=[1, 2]
        ),
        lambda x: F.conv_transpose2d(
            x, torch.from_numpy(TRANSPOSED), torch.from_numpy(normal(6)), (2, 3), (1, 0), groups=2, dilation=(1, 2)
        ),
        IMAGE,
    ),
    "conv_transpose, output shape": (
        lambda x: mb.conv_transpose(
            x=x, weight=TRANSPOSED, strides=[2, 2], pad_type="custom", pad=[1, 0, 1, 0], output_shape=[2, 3, 14, 18]
        ),
        lambda x: F.conv_transpose2d(x, torch.from_numpy(TRANSPOSED), None, 2, 1, output_padding=1),
        IMAGE,
    ),
    "max_pool": (lambda x: mb.max_pool(x=x, pad_type="valid", **POOL), lambda x: F.max_pool2d(x, (3, 2), 2), IMAGE),
    "max_pool, ceil": (
        lambda x: mb.max_pool(x=x, pad_type="custom", pad=[1, 1, 1, 1], ceil_mode=True, **POOL),
        lambda x: F.max_pool2d(x, (3, 2), 2, (1, 1), ceil_mode=True),
        IMAGE,
    ),
    "avg_pool": (
        lambda x: mb.avg_pool(x=x, pad_type="custom", pad=[1, 1, 1, 1], exclude_padding_from_average=True, **POOL),
        lambda x: F.avg_pool2d(x, (3, 2), 2, (1, 1), count_include_pad=False),
        IMAGE,
    ),
    "avg_pool, padding counts": (
        lambda x: mb.avg_pool(x=x, pad_type="custom", pad=[1, 1, 1, 1], **POOL),
        lambda x: F.avg_pool2d(x, (3, 2), 2, (1, 1)),
        IMAGE,
    ),
    "l2_pool": (
        lambda x: mb.l2_pool(x=x, pad_type="valid", **POOL),
        lambda x: (F.avg_pool2d(x * x, (3, 2), 2) * 6).sqrt(),
        IMAGE,
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
    # images
    "upsample_nearest_neighbor": (
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2.0, scale_factor_width=3.0),
        lambda x: F.interpolate(x, scale_factor=(2.0, 3.0), mode="nearest"),
        IMAGE,
    ),
    "upsample_bilinear": (
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2.0, scale_factor_width=3.0, align_corners=False),
        lambda x: F.interpolate(x, scale_factor=(2.0, 3.0), mode="bilinear"),
        IMAGE,
    ),
    "upsample_bilinear, corners": (
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2.0, scale_factor_width=3.0, align_corners=True),
        lambda x: F.interpolate(x, scale_factor=(2.0, 3.0), mode="bilinear", align_corners=True),
        IMAGE,
    ),
    "resize_nearest_neighbor": (
        lambda x: mb.resize_nearest_neighbor(x=x, target_size_height=10, target_size_width=5),
        lambda x: F.interpolate(x, (10, 5), mode="nearest"),
        IMAGE,
    ),
    "resize_bilinear": (
        lambda x: mb.resize_bilinear(x=x, target_size_height=10, target_size_width=5, sampling_mode="UNALIGN_CORNERS"),
        lambda x: F.interpolate(x, (10, 5), mode="bilinear"),
        IMAGE,
    ),
    "resize_bilinear, corners": (
        lambda x: mb.resize_bilinear(x=x, target_size_height=10, target_size_width=5, sampling_mode="STRICT_ALIGN_CORNERS"),
        lambda x: F.interpolate(x, (10, 5), mode="bilinear", align_corners=True),
        IMAGE,
    ),
    **{
        f"resample, {sampling}, {padding}, {corners}": (
            lambda x, grid, sampling=sampling, padding=padding, corners=corners: mb.resample(
                x=x,
                coordinates=grid,
                sampling_mode=sampling,
                padding_mode=PADDING[padding, corners],
                padding_value=0.0,
                coordinates_mode="normalized_minus_one_to_one",
                align_corners=corners,
            ),
            partial(F.grid_sample, mode=sampling, padding_mode=padding, align_corners=corners),
            IMAGE,
            normal(2, 5, 4, 2, seed=10),
        )
        for sampling in ("bilinear", "nearest")
        for padding in ("zeros", "border", "reflection")
        for corners in (False, True)
    },
    "resample, in pixels": (
        lambda x, grid: mb.resample(
            x=x,
            coordinates=grid,
            sampling_mode="bilinear",
            padding_mode="border",
            padding_value=0.0,
            coordinates_mode="unnormalized",
            align_corners=True,
        ),
        lambda x, grid: F.grid_sample(x, grid / torch.tensor([4.0, 3.0]) - 1, padding_mode="border", align_corners=True),
        IMAGE,
        3 * normal(2, 5, 4, 2, seed=10),
    ),
    "resample, from 0 to 1": (
        lambda x, grid: mb.resample(
            x=x,
            coordinates=grid,
            sampling_mode="bilinear",
            padding_mode="constant",
            padding_value=0.5,
            coordinates_mode="normalized_zero_to_one",
            align_corners=True,
        ),
        lambda x, grid: F.grid_sample(x - 0.5, 2 * grid - 1, align_corners=True) + 0.5,
        IMAGE,
        normal(2, 5, 4, 2, seed=10),
    ),
    # quantised activations
    "quantize": (
        lambda x: mb.quantize(input=x, scale=0.02, zero_point=np.int8(3), output_dtype="int8"),
        lambda x: (torch.round(x / 0.02) + 3).clamp(-128, 127),
        X,
    ),
    "dequantize": (
        lambda x: mb.dequantize(
            input=mb.quantize(input=x, scale=np.float32([0.02, 0.03, 0.04]), output_dtype="int8", axis=1),
            scale=np.float32([0.02, 0.03, 0.04]),
            axis=1,
        ),
        lambda x: torch.fake_quantize_per_channel_affine(
            x, torch.tensor([0.02, 0.03, 0.04]), torch.zeros(3, dtype=torch.int32), 1, -128, 127
        ),
        X,
    ),
}


def _tensor(x):
    return torch.from_numpy(x.copy())


@pytest.mark.parametrize("name", CASES)
def test_the_operation_is_that_of_torch(name, program):
    build, oracle, *arrays = CASES[name]
    built, inputs = program(build, *arrays)
    assert name.partition(",")[0] in {op.op_type for op in built.functions["main"].operations}
    expected = oracle(*map(_tensor, arrays))
    expected = expected if isinstance(expected, tuple) else (expected,)
    got = list(Interpreter(built).run(inputs).values())
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.astype(np.float64), y.double().numpy(), rtol=2e-5, atol=2e-6)


# What MIL computes itself when the program is built, or has only under older opsets, and what the tests below cover.
ELSEWHERE = {
    "shape", "fill", "range_1d", "reshape_like",
    *(name for name in OPERATIONS if name.startswith("constexpr_")),
}  # fmt: skip


def test_every_operation_has_a_case():
    assert set(OPERATIONS) - ELSEWHERE == {name.partition(",")[0] for name in CASES}


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        ("shape", {"x": X}, [2, 3, 4]),
        ("fill", {"shape": np.int32([2, 1]), "value": np.float32(3)}, [[3.0], [3.0]]),
        ("range_1d", {"start": np.int32(2), "end": np.int32(9), "step": np.int32(3)}, [2, 5, 8]),
        (
            "reshape_like",
            {
                "x": np.arange(6),
                "ref_tensors": (np.zeros((5, 3)), np.zeros((2, 7))),
                "begins": np.int32([1, 0]),
                "ends": np.int32([0, 1]),
                "end_masks": np.array([True, False]),
            },
            [[0, 1], [2, 3], [4, 5]],
        ),
    ],
)
def test_operations_that_a_program_with_fixed_sizes_does_not_keep(name, inputs, expected):
    np.testing.assert_array_equal(OPERATIONS[name](**inputs), expected)


# Compressed weights, by the examples and rules of MIL's documentation.


def test_weights_in_blocks():
    data = np.int8([[1, 2, 3, 4], [-5, 6, -7, 8]])
    scale, offset = np.float32([[0.5, 2.0]]), np.int8([[1, -1]])
    got = OPERATIONS["constexpr_blockwise_shift_scale"](data=data, scale=scale, offset=offset)
    np.testing.assert_array_equal(got, [[0.0, 0.5, 8.0, 10.0], [-3.0, 2.5, -12.0, 18.0]])
    mask = np.uint8([[1, 0, 0, 1], [0, 1, 1, 0]])
    kept, values = OPERATIONS["constexpr_sparse_blockwise_shift_scale"](data_mask=mask, nonzero_data=data[mask != 0], scale=scale)
    np.testing.assert_array_equal(kept, mask)
    np.testing.assert_array_equal(values, [0.5, 8.0, 3.0, -14.0])


def test_weights_with_a_table():
    indices = np.uint8([[2, 3], [3, 0], [1, 0], [3, 0], [2, 1], [0, 3]])
    lut = np.float32([1, 5, 9, 13, 2, 10, 18, 26]).reshape(2, 1, 4, 1)
    got = OPERATIONS["constexpr_lut_to_dense"](indices=indices, lut=lut)
    np.testing.assert_array_equal(got, [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]])
    vectors = np.float32([[1, 2, 3], [4, 5, 6]]).reshape(1, 1, 2, 3)
    got = OPERATIONS["constexpr_lut_to_dense"](indices=np.uint8([[0, 1]]), lut=vectors, vector_axis=np.int32(0))
    np.testing.assert_array_equal(got, [[1, 4], [2, 5], [3, 6]])
    mask, values = OPERATIONS["constexpr_lut_to_sparse"](
        indices_mask=np.uint8([[1, 0, 1]]), indices_nonzero_data=np.uint8([1, 0]), lut=np.float32([2, 3]).reshape(1, 1, 2, 1)
    )
    np.testing.assert_array_equal(OPERATIONS["constexpr_sparse_to_dense"](nonzero_data=values, mask=mask), [[3, 0, 2]])


def test_weights_of_ios16():
    from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as theirs

    data, scale, zero = rng(8).integers(0, 255, (3, 4), dtype=np.uint8), np.float32([0.1, 0.2, 0.3]), np.uint8([7, 8, 9])
    got = OPERATIONS["constexpr_affine_dequantize"](quantized_data=data, zero_point=zero, scale=scale, axis=np.int32(0))
    np.testing.assert_allclose(got, (data.astype(np.float32) - zero[:, None]) * scale[:, None])
    lut, packed, shape = normal(64), rng(9).integers(0, 255, 9, dtype=np.uint8), np.uint32([3, 4])
    expected = theirs.constexpr_lut_to_dense.decompress(lut, packed, shape)
    np.testing.assert_array_equal(OPERATIONS["constexpr_lut_to_dense"](indices=packed, lut=lut, shape=shape), expected)
    mask = np.packbits(np.uint8([1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0]), bitorder="little")
    got = OPERATIONS["constexpr_sparse_to_dense"](nonzero_data=np.float32([1, 2, 3, 4]), mask=mask, shape=shape)
    np.testing.assert_array_equal(got, [[1, 0, 0, 2], [3, 0, 0, 0], [0, 4, 0, 0]])
    assert OPERATIONS["constexpr_cast"](source_val=lut, output_dtype="fp32") is lut
