"""Convolutions, pooling and resizing; see `operations.py`."""

from functools import partial

import torch
import torch.nn.functional as F

PADDING = {  # what torch's reflection is called where the corners are the edges of pixels
    **{(padding, corners): name for padding, name in (("zeros", "constant"), ("border", "border")) for corners in (False, True)},
    ("reflection", True): "reflection",
    ("reflection", False): "symmetric",
}


def cases_of(given):
    """How each operation is built, what it is in torch, and on which inputs, by its name."""
    mb, normal = given.mb, given.normal
    X, IMAGE, KERNEL, TRANSPOSED, POOL = given.X, given.IMAGE, given.KERNEL, given.TRANSPOSED, given.POOL
    return {
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
    }
