"""Pictures for the report: samples and their amplified difference, as PNG files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SIDE = 96
"""Pictures with a shorter side than this, in pixels, are enlarged to at least this by a whole factor, so that 8 by 8 digits can be seen."""

_NOT_FINITE = (255, 0, 255)  # magenta: a colour that no grey picture has


def amplification(difference: Array) -> float:
    """The factor that makes the largest of some differences just visible: 1, 2 or 5 times a power of ten, as large as keeps it within 1.

    Args:
        difference: Any shape; values that are not finite are left out.

    Returns:
        At least 1; 1 where there is no difference.
    """
    finite = np.abs(difference[np.isfinite(difference)])
    largest = float(finite.max(initial=0.0))
    if not 0 < largest < 1:
        return 1.0
    decade = 10.0 ** math.floor(-math.log10(largest))
    return max(factor * decade for factor in (1.0, 2.0, 5.0) if factor * decade * largest <= 1 or factor == 1.0)


def to_pixels(image: Array) -> Array:
    """8-bit RGB of one picture, enlarged by whole pixels where it is small; NaN and Inf become magenta.

    Args:
        image: (H, W) or (H, W, 3), float, black at 0 and white at 1; clipped to that.

    Returns:
        (k H, k W, 3), uint8, with the smallest k that makes the shorter side `SIDE`.
    """
    colour = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
    broken = ~np.isfinite(colour).all(axis=-1)
    pixels = np.round(np.clip(np.nan_to_num(colour.astype(np.float64)), 0, 1) * 255).astype(np.uint8)
    pixels[broken] = _NOT_FINITE
    factor = math.ceil(SIDE / max(1, min(pixels.shape[:2])))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def write_png(path: Path, image: Array) -> None:
    """Writes one picture (see `to_pixels`); the same picture gives the same bytes."""
    from matplotlib.image import imsave  # matplotlib takes a while to import

    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, to_pixels(image), format="png", metadata={"Software": "isthmus"})
