"""Weights rounded with regard to the inputs that they meet: GPTQ, and the bias that rounding leaves behind.

Nearest rounding makes the error of every weight as small as can be; what counts is the error of their products. With inputs x that vary
together, the error of one weight can make up for that of another.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..exporter.errors import IsthmusError
from ..exporter.grids import Grid, Parameters

Array = np.ndarray[Any, Any]
Float64 = np.ndarray[Any, np.dtype[np.float64]]

DAMPING = 0.01
"""What is added to the diagonal, of its mean (Frantar et al., section 3.3, step 3)."""

_BLOCK = 128
"""Columns whose errors reach the later ones in one product (Frantar et al., section 3.3, step 2)."""


def gptq(weight: Array, gram: Array, scales: Array, grid: Grid, *, damping: float = DAMPING) -> Float64:
    """The codes of a weight by GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1).

    Columns are rounded in the order of falling input energy. The error of each is made up for by those not rounded yet, in the way that
    changes the layer's outputs the least: by the Cholesky factor of the inverse of the inputs' second moments.

    Args:
        weight: (outputs, inputs), finite.
        gram: (inputs, inputs) sum of x xᵀ over the inputs x that were seen. Any positive multiple gives the same codes.
        scales: (outputs,), or (outputs, groups) where groups of `inputs / groups` columns have a scale of their own.
        grid: A symmetric one.
        damping: What is added to the diagonal, of its mean: above 0.

    Returns:
        (outputs, inputs) codes, float64.

    Raises:
        IsthmusError: The second moments are not finite, or not positive definite in spite of the damping.
    """
    outputs, inputs = weight.shape
    scale = np.repeat(scales.reshape(outputs, -1), inputs // scales.reshape(outputs, -1).shape[1], axis=1).astype(np.float64)
    moments = np.asarray(gram, np.float64)
    moments = (moments + moments.T) / 2
    energy = np.diagonal(moments)
    mean = float(energy.mean())
    if mean == 0:
        return grid.codes(weight, Parameters(scale, 0.0))  # no input was ever anything but 0
    order = np.argsort(-energy, kind="stable")
    try:
        factor = np.linalg.cholesky(np.linalg.inv(moments[np.ix_(order, order)] + damping * mean * np.eye(inputs))).T
    except np.linalg.LinAlgError as error:
        raise IsthmusError(
            f"the second moments of a layer's inputs have no Cholesky factor: {error}", hint="use more calibration data"
        ) from error
    if not np.isfinite(factor).all():
        raise IsthmusError("the second moments of a layer's inputs are not finite", hint="check the calibration data")
    left = np.asarray(weight, np.float64)[:, order].copy()
    scale = scale[:, order]
    codes = np.empty_like(left)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors = np.empty((outputs, stop - start))
        for column in range(start, stop):
            parameters = Parameters(scale[:, column], 0.0)
            codes[:, column] = grid.codes(left[:, column], parameters)
            errors[:, column - start] = (left[:, column] - codes[:, column] * scale[:, column]) / factor[column, column]
            left[:, column:stop] -= np.outer(errors[:, column - start], factor[column, column:stop])
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    restored = np.empty_like(codes)
    restored[:, order] = codes
    return restored


def output_error(weight: Array, read: Array, gram: Array) -> float:
    """The summed squared error of a layer's outputs, tr((W - Ŵ) Σ x xᵀ (W - Ŵ)ᵀ), for exact inputs.

    Args:
        weight: (outputs, inputs).
        read: What is read back of it.
        gram: (inputs, inputs) sum of x xᵀ.
    """
    error = np.asarray(weight, np.float64) - read
    return float(np.einsum("oi,oi->", error @ np.asarray(gram, np.float64), error))


def bias_correction(weight: Array, read: Array, means: Array, read_means: Array | None = None) -> Float64:
    """What a layer's outputs lack on average once it is quantised, to be added to its bias (Nagel et al., arXiv:1906.04721, section 4.2).

    Args:
        weight: (outputs, inputs).
        read: What is read back of it.
        means: (inputs,) the mean input.
        read_means: (inputs,) the mean of the inputs as they are read back; by default the same.

    Returns:
        (outputs,) float64: E[W x] - E[Ŵ x̂].
    """
    means = np.asarray(means, np.float64)
    read_means = means if read_means is None else np.asarray(read_means, np.float64)
    return np.asarray(np.asarray(weight, np.float64) @ means - np.asarray(read, np.float64) @ read_means)
