"""Scikit-learn's digits: 1797 grey pictures of 8x8 pixels, values 0 to 16, ten classes, from the UCI test set of handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Split:
    """Pictures and their classes.

    Attributes:
        images: (N, 8, 8) float32 in [0, 1].
        labels: (N,) int64 in [0, 9].
    """

    images: Array
    labels: Array


def digits() -> tuple[Split, Split]:
    """The training split (1347 pictures) and the held-out split (450), the same on every call, classes in proportion.

    Both the generative models and the judge are trained on the first; the judge is checked on the second.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8) / 16).astype(np.float32)
    parts = train_test_split(images, labels.astype(np.int64), test_size=0.25, random_state=0, stratify=labels)
    return Split(parts[0], parts[2]), Split(parts[1], parts[3])
