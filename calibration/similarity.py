"""Structural similarity of pictures (SSIM).

Zhou Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
Transactions on Image Processing 13 (4), 2004, equations 13 to 17: with means, variances and covariance in a Gaussian window::

    SSIM(x, y) = (2 mx my + C1) (2 sxy + C2) / ((mx^2 + my^2 + C1) (sx^2 + sy^2 + C2)),   C1 = (0.01 L)^2, C2 = (0.03 L)^2

averaged over every place where the window lies in the picture. What is nearer to what people see, `perceptual` has.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

WINDOW = 11
"""The window's side, pixels; for smaller pictures, the largest odd number that fits."""

SIGMA = 1.5
"""The standard deviation of the window's weights, pixels."""


def ssim(reference: Array, candidate: Array) -> float:
    """The mean structural similarity of two pictures: 1 for equal ones, near 0 for unrelated ones; NaN where a pixel is not finite.

    Args:
        reference: (H, W) or (H, W, 3), float, black at 0 and white at 1 (L = 1). Colours are averaged.
        candidate: The same shape.
    """
    x, y = (image.astype(np.float64).reshape(*image.shape[:2], -1) for image in (reference, candidate))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    side = min(WINDOW, *x.shape[:2])
    weights = _gaussian(side - 1 + side % 2)
    mx, my = _filtered(x, weights), _filtered(y, weights)
    sxx, syy, sxy = _filtered(x * x, weights) - mx * mx, _filtered(y * y, weights) - my * my, _filtered(x * y, weights) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mx * my + c1) * (2 * sxy + c2) / ((mx * mx + my * my + c1) * (sxx + syy + c2))
    return float(found.mean())


def _gaussian(side: int) -> Array:
    offsets = np.arange(side) - (side - 1) / 2
    weights: Array = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    return weights


def _filtered(images: Array, weights: Array) -> Array:
    """The weighted mean in every window that lies in the picture, along both axes: the window is a product of two."""
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(images, weights.size, axis=axis)
        images = windows @ weights
    return images
