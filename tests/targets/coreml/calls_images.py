"""Calls on images; see `calls.py`."""

from functools import partial

import torch
import torch.nn.functional as F

INF = float("inf")
aten = torch.ops.aten


def families_of(calls):
    """The families, by name."""
    Family, normal = calls.Family, calls.normal
    families = {}
    families["convolutions"] = Family(
        {"x": normal(1, 4, 9, 7), "row": normal(1, 4, 9, seed=1)},
        {
            "plain": lambda x: F.conv2d(x, normal(6, 4, 3, 3), normal(6), 2, 1),
            "same": lambda x: F.conv2d(x, normal(6, 4, 3, 3), normal(6), padding="same", dilation=2),
            "valid": lambda x: F.conv2d(x, normal(6, 4, 3, 3), padding="valid"),
            "same, even": lambda row: F.conv1d(row, normal(6, 4, 4), padding="same"),
            "depthwise": lambda x: F.conv2d(x, normal(8, 1, 3, 3), None, 1, (1, 2), (1, 2), 4),
            "one axis": lambda row: F.conv1d(row, normal(6, 4, 4), None, 2, 3, 2),
            "three axes": lambda x: F.conv3d(x.unflatten(2, (3, 3)), normal(2, 4, 2, 3, 3), None, 1, (1, 0, 1)),
            "no batch": lambda x: F.conv2d(x[0], normal(6, 4, 3, 3), normal(6)),
            "no batch, same": lambda x: F.conv2d(x[0], normal(6, 4, 3, 3), normal(6), padding="same"),
            "no batch, one axis": lambda row: [F.conv1d(row[0], normal(6, 4, 4), padding=p, dilation=d) for p, d in ((1, 1), ("same", 2))],
            "no batch, three axes": lambda x: [F.conv3d(x[0].unflatten(1, (3, 3)), normal(2, 4, 2, 3, 3), padding=p) for p in (1, "same")],
            "weights computed": lambda x: F.conv2d(x, normal(6, 4, 3, 3) * x.mean()),
            "circular": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), normal(6, 4, 3, 3)),
            "transposed": lambda x: F.conv_transpose2d(x, normal(4, 3, 3, 3), normal(3), 2, 1, 1),
            "transposed, uneven": lambda x: F.conv_transpose2d(x, normal(4, 3, 3, 3), torch.ones(3), (2, 3), (1, 0), (0, 2)),
            "transposed, groups": lambda x: F.conv_transpose2d(x, normal(4, 3, 3, 3), torch.arange(6.0), 2, 1, 1, 2),
            "transposed, dilated": lambda x: F.conv_transpose2d(x, normal(4, 3, 3, 3), None, 2, 1, 1, 1, 2),
            "transposed, output padding alone": lambda x: F.conv_transpose2d(x, normal(4, 3, 3, 3), None, 2, 0, 1),
            "transposed, one axis": lambda row: F.conv_transpose1d(row, normal(4, 2, 3), None, 2, 0, 1, 4),
            "transposed, three axes": lambda x: F.conv_transpose3d(
                x.unflatten(2, (3, 3)), normal(4, 2, 2, 3, 3), None, 2, (0, 1, 1), (0, 1, 0)
            ),
            "transposed, even": lambda x: F.conv_transpose2d(x, normal(4, 2, 4, 4), None, 2, 1),
            "transposed, no batch": lambda x: F.conv_transpose2d(x[0], normal(4, 3, 3, 3), normal(3), 2, 1),
        },
    )

    families["pooling"] = Family(
        {"x": normal(1, 3, 9, 8), "row": normal(1, 3, 11, seed=1)},
        {
            "avg": lambda x: F.avg_pool2d(x, 3, 2, 1),
            "avg, padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            "avg, ceil": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
            "avg, ceil, padded": lambda x: F.avg_pool2d(x, (3, 2), 2, 1, True, True),
            "avg, ceil, padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, True, False),
            "avg, divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, False, True, 5),
            "avg, no stride": lambda x: F.avg_pool2d(x, 3),
            "avg, no batch": lambda x: F.avg_pool2d(x[0], 3, 2),
            "avg, one axis": lambda row: F.avg_pool1d(row, 3, 2, 1, False, False),
            "avg, one axis, ceil": lambda row: F.avg_pool1d(row, 4, 3, 0, True),
            "avg, three axes": lambda x: F.avg_pool3d(x.unflatten(2, (3, 3)), 2, 1, 1, count_include_pad=False),
            "avg, three axes, ceil": lambda x: F.avg_pool3d(x.unflatten(2, (3, 3)), 2, 2, 0, True),
            "max": lambda x: F.max_pool2d(x, 3, 2, 1),
            "max, ceil": lambda x: F.max_pool2d(x, 3, 2, 1, 1, True),
            "max, ceil, last window dropped": lambda x: F.max_pool2d(x, 2, 3, 1, 1, True),
            "max, dilated": lambda x: F.max_pool2d(x, 3, 2, 1, 2),
            "max, no stride": lambda x: F.max_pool2d(x, 3),
            "max, no batch": lambda x: F.max_pool2d(x[0], 3, 2),
            "max, one axis": lambda row: F.max_pool1d(row, 4, 3, 1, 1, True),
            "max, one axis, dilated": lambda row: F.max_pool1d(row, 3, 1, 1, 2),
            "max, three axes": lambda x: F.max_pool3d(x.unflatten(2, (3, 3)), 2, 1, 1),
            "max, three axes, ceil": lambda x: F.max_pool3d(x.unflatten(2, (3, 3)), 2, 2, 0, ceil_mode=True),
            "adaptive avg": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
            "adaptive avg, larger": lambda x: F.adaptive_avg_pool2d(x, (12, 5)),
            "adaptive avg, half": lambda x: F.adaptive_avg_pool2d(x, (None, 2)),
            "adaptive avg, one axis": lambda row: F.adaptive_avg_pool1d(row, 4),
            "adaptive avg, three axes": lambda x: F.adaptive_avg_pool3d(x.unflatten(2, (3, 3)), (2, 2, 2)),
            "adaptive max": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
            "adaptive max, one axis": lambda row: F.adaptive_max_pool1d(row, 4),
            "lp": lambda x: F.lp_pool2d(x, 3, 2, 2),
        },
    )

    def resized(**options):
        return lambda x: F.interpolate(x, **options)

    families["resizing"] = Family(
        {"x": normal(1, 3, 6, 8), "row": normal(1, 3, 7, seed=1), "volume": normal(1, 2, 4, 3, 6, seed=2)},
        {
            **{
                f"{mode}, {', '.join(f'{k} {v}' for k, v in options.items())}": resized(mode=mode, **options)
                for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")
                for options in (
                    {"scale_factor": 2},
                    {"size": (5, 7)},
                    {"size": (13, 16)},
                    {"scale_factor": 1.3},
                    {"scale_factor": 1.3, "recompute_scale_factor": True},
                    {"scale_factor": 0.5},
                )
            },
            **{
                f"{mode}, corners, {size}": resized(mode=mode, size=size, align_corners=True)
                for mode in ("bilinear", "bicubic")
                for size in ((5, 7), (12, 16), (1, 1))
            },
            **{
                f"{mode}, antialias, {size}, {corners}": resized(mode=mode, size=size, align_corners=corners, antialias=True)
                for mode in ("bilinear", "bicubic")
                for size in ((4, 5), (9, 10))
                for corners in (False, True)
            },
            "bilinear, antialias, factor": resized(mode="bilinear", scale_factor=0.45, antialias=True),
            "area": resized(mode="area", size=(4, 3)),
            "overloads": lambda x, row, volume: [
                aten.upsample_nearest1d.default(row, [4]),
                aten.upsample_nearest2d.default(x, [5, 6], 0.9, None),
                aten.upsample_nearest3d.default(volume, [3, 4, 4]),
                aten._upsample_nearest_exact1d.default(row, [4]),
                aten._upsample_nearest_exact2d.default(x, [5, 6]),
                aten._upsample_nearest_exact3d.default(volume, [3, 4, 4]),
                aten.upsample_linear1d.default(row, [4], False),
                aten.upsample_bilinear2d.default(x, [5, 6], False, 0.9, None),
                aten.upsample_trilinear3d.default(volume, [3, 4, 4], True),
                aten.upsample_bicubic2d.default(x, [5, 6], False),
                aten._upsample_bilinear2d_aa.default(x, [5, 6], False),
                aten._upsample_bicubic2d_aa.default(x, [5, 6], True),
            ],
            "nearest, one axis": lambda row: F.interpolate(row, size=5, mode="nearest"),
            "nearest-exact, one axis": lambda row: F.interpolate(row, scale_factor=2, mode="nearest-exact"),
            "linear": lambda row: F.interpolate(row, size=5, mode="linear"),
            "linear, corners": lambda row: F.interpolate(row, scale_factor=2, mode="linear", align_corners=True),
            "nearest, three axes": lambda volume: F.interpolate(volume, size=(3, 4, 5), mode="nearest"),
            "nearest-exact, three axes": lambda volume: F.interpolate(volume, size=(3, 4, 5), mode="nearest-exact"),
            "trilinear": lambda volume: F.interpolate(volume, size=(3, 4, 5), mode="trilinear"),
            "trilinear, corners": lambda volume: F.interpolate(volume, scale_factor=2, mode="trilinear", align_corners=True),
        },
    )

    families["sampling"] = Family(
        {
            "x": normal(1, 3, 6, 7),
            "grid": 1.2 * normal(1, 5, 4, 2, seed=1),
            "theta": torch.tensor([[[1.0, 0.1, 0.2], [-0.1, 0.9, 0.1]]]),
        },
        {
            **{
                f"{mode}, {padding}, {corners}": partial(
                    lambda x, grid, *, options: F.grid_sample(x, grid, *options), options=(mode, padding, corners)
                )
                for mode in ("bilinear", "nearest")
                for padding in ("zeros", "border", "reflection")
                for corners in (False, True)
            },
            "affine_grid": lambda theta: F.affine_grid(theta, (1, 3, 4, 5), align_corners=False),
            "affine_grid, sampled": lambda x, theta: F.grid_sample(
                x, F.affine_grid(theta, (1, 3, 4, 5), align_corners=True), align_corners=True
            ),
        },
    )

    families["padding"] = Family(
        {"x": normal(2, 3, 5, 6)},
        {
            "constant": lambda x: F.pad(x, (1, 2, 0, 3), value=0.5),
            "constant, no value": lambda x: F.pad(x, (1, 1)),
            "constant, all axes": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1, 1, 0), value=-1.0),
            "constant, infinite": lambda x: F.pad(x, (1, 1), value=-INF).amax(-1),
            "negative": lambda x: F.pad(x, (-1, 2, 0, -3)),
            "reflect": lambda x: F.pad(x, (1, 2, 2, 1), "reflect"),
            "replicate": lambda x: F.pad(x, (1, 2, 3, 1), "replicate"),
            "circular": lambda x: F.pad(x, (1, 2, 2, 1), "circular"),
            "circular, one axis": lambda x: F.pad(x[0], (1, 2), "circular"),
            "reflect, one axis": lambda x: F.pad(x[0], (2, 1), "reflect"),
            "replicate, three axes": lambda x: F.pad(x.unsqueeze(0), (1, 1, 1, 0, 0, 2), "replicate"),
            "reflect, three axes": lambda x: F.pad(x.unsqueeze(0), (1, 1, 1, 0, 0, 2), "reflect"),
            "booleans": lambda x: F.pad(x > 0, (1, 1), value=True),
            "integers": lambda x: F.pad((3 * x).int(), (1, 1), value=7),
            "constant_pad_nd": lambda x: [torch.constant_pad_nd(x, (1, 1), 2), aten.constant_pad_nd.default(x, [-1, 1], 2.0)],
        },
    )
    return families
