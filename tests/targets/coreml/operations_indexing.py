"""Shapes, and parts of tensors; see `operations.py`."""

import numpy as np
import torch
import torch.nn.functional as F


def cases_of(given):
    """How each operation is built, what it is in torch, and on which inputs, by its name."""
    mb, normal = given.mb, given.normal
    X, IMAGE, PLACES, ALONG, SQUARE = given.X, given.IMAGE, given.PLACES, given.ALONG, given.SQUARE
    return {
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
        "sliding_windows": (
            lambda x: mb.sliding_windows(x=x, axis=1, size=2, stride=3),
            lambda x: x.unfold(1, 2, 3).movedim(-1, 2),
            SQUARE,
        ),
        # parts of tensors
        "slice_by_index": (
            lambda x: mb.slice_by_index(x=x, begin=[0, 2, 3], end=[2, 0, 1], stride=[1, -1, -2], begin_mask=[True, False, False]),
            lambda x: x.flip(1, 2)[:, :2, ::2][:, :, :1],
            X,
        ),
        "slice_by_index, squeezed": (
            lambda x: mb.slice_by_index(
                x=x, begin=[1, -2, 0], end=[2, 0, 3], end_mask=[False, True, False], squeeze_mask=[True, False, False]
            ),
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
    }
