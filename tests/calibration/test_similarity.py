"""SSIM against the formula of its paper: written out pixel by pixel, and with scipy's Gaussian filter."""

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from isthmus.calibration.similarity import ssim


def pictures(shape, *, error=0.1, seed=0):
    rng = np.random.default_rng(seed)
    x = gaussian_filter(rng.random(shape), sigma=(1, 1, 0)[: len(shape)])
    x = (x - x.min()) / (x.max() - x.min())
    return x.astype(np.float32), np.clip(x + error * rng.standard_normal(shape), 0, 1).astype(np.float32)


def written_out(x, y, side):
    """Equations 13 to 16 of the paper, in every window that lies in the picture."""
    half = (side - 1) / 2
    grid = np.arange(side) - half
    w = np.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    found = []
    for i in range(x.shape[0] - side + 1):
        for j in range(x.shape[1] - side + 1):
            a, b = (image[i : i + side, j : j + side].astype(np.float64) for image in (x, y))
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            found.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return float(np.mean(found))


@pytest.mark.parametrize(("shape", "side"), [((24, 17), 11), ((11, 30), 11), ((8, 8), 7), ((5, 9), 5), ((2, 2), 1)])
@pytest.mark.parametrize("error", [0.01, 0.3])
def test_it_is_the_formula(shape, side, error):
    x, y = pictures(shape, error=error)
    assert ssim(x, y) == pytest.approx(written_out(x, y, side), abs=1e-12)


def test_it_agrees_with_filters_of_scipy():
    """As scikit-image computes it with gaussian_weights=True, use_sample_covariance=False and data_range=1."""
    x, y = (image.astype(np.float64) for image in pictures((64, 48)))

    def filtered(image):
        return gaussian_filter(image, sigma=1.5, truncate=3.5)[5:-5, 5:-5]

    mx, my = filtered(x), filtered(y)
    vx, vy, cov = filtered(x * x) - mx**2, filtered(y * y) - my**2, filtered(x * y) - mx * my
    expected = ((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean()
    assert ssim(x, y) == pytest.approx(expected, abs=1e-12)


def test_colours_are_averaged():
    x, y = pictures((16, 20, 3))
    assert ssim(x, y) == pytest.approx(np.mean([ssim(x[..., c], y[..., c]) for c in range(3)]), abs=1e-12)


def test_equal_pictures_and_broken_ones():
    x, y = pictures((16, 16))
    assert ssim(x, x) == 1.0
    assert ssim(x, y) < 0.95
    assert abs(ssim(x, 1 - x)) < 1
    y[3, 4] = np.inf
    assert math.isnan(ssim(x, y))
