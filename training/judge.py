"""Measures of generated digits: whether a classifier names the class asked for, whether they differ, and whether they are new."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from isthmus.models.flow import RectifiedFlowSampler, Step

from .data import Array, digits


@dataclass(frozen=True)
class Figures:
    """How good generated pictures are.

    Attributes:
        samples: Number of pictures judged.
        real_accuracy: Share of the held-out real pictures that the classifier names rightly.
        sample_accuracy: Share of the generated pictures that it names as the class asked for.
        worst_class_accuracy: The same for the class that fares worst.
        diversity: Mean distance between two generated pictures of a class over that of real ones; the smallest over the classes.
        nearest_to_training: Smallest distance of a generated picture to a training picture; 0 is a copy. Distances are root mean square
            differences of pixels in [0, 1].
        held_out_nearest_to_training: The same for the held-out pictures: how near to each other different real pictures come.
        median_nearest_to_training: The median of the distances to the nearest training picture.
        held_out_median_nearest_to_training: The same for the held-out pictures.
    """

    samples: int
    real_accuracy: float
    sample_accuracy: float
    worst_class_accuracy: float
    diversity: float
    nearest_to_training: float
    held_out_nearest_to_training: float
    median_nearest_to_training: float
    held_out_median_nearest_to_training: float


@cache
def classifier() -> Any:
    """A support vector machine on the pixels, trained on the real digits' training split."""
    from sklearn.svm import SVC

    train, _ = digits()
    return SVC(C=10.0).fit(train.images.reshape(-1, 64), train.labels)


def real_accuracy() -> float:
    """Share of the held-out real pictures that the classifier names rightly."""
    _, held_out = digits()
    return float(np.mean(classifier().predict(held_out.images.reshape(-1, 64)) == held_out.labels))


def distances(a: Array, b: Array) -> Array:
    """Root mean square pixel differences between each picture of (N, 8, 8) and each of (M, 8, 8), as (N, M)."""
    return np.sqrt(np.mean((a[:, None] - b[None]) ** 2, axis=(2, 3)))


def judge(images: Array, labels: Array) -> Figures:
    """Measures generated pictures.

    Args:
        images: (N, 8, 8) in [0, 1], at least two of each class that occurs.
        labels: (N,) the classes asked for.
    """
    train, held_out = digits()
    right = classifier().predict(images.reshape(-1, 64)) == labels
    classes = np.unique(labels)
    near, held_out_near = distances(images, train.images).min(axis=1), distances(held_out.images, train.images).min(axis=1)
    return Figures(
        samples=len(images),
        real_accuracy=real_accuracy(),
        sample_accuracy=float(right.mean()),
        worst_class_accuracy=min(float(right[labels == c].mean()) for c in classes),
        diversity=min(_spread(images[labels == c]) / _spread(train.images[train.labels == c]) for c in classes),
        nearest_to_training=float(near.min()),
        held_out_nearest_to_training=float(held_out_near.min()),
        median_nearest_to_training=float(np.median(near)),
        held_out_median_nearest_to_training=float(np.median(held_out_near)),
    )


def draw(sampler: RectifiedFlowSampler, step: Step, *, per_class: int, seed: int) -> tuple[Array, Array]:
    """Draws `per_class` pictures of each digit, in calls of at most 64 rows: pictures (N, 8, 8) and the classes asked for (N,)."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    remaining = per_class
    while remaining:
        repeats = min(remaining, 3)  # ten digits, three times, doubled for guidance: 60 rows
        part = dataclasses.replace(sampler, labels=tuple(range(10)) * repeats)
        images.append(part(step, rng).images)
        labels.append(np.array(part.labels))
        remaining -= repeats
    return np.concatenate(images), np.concatenate(labels)


def _spread(images: Array) -> float:
    pairs = distances(images, images)
    return float(pairs.sum() / (len(images) * (len(images) - 1)))
