"""Weights rounded with regard to the inputs that they meet: GPTQ, and the bias that rounding leaves behind.

Nearest rounding makes the error of every weight as small as can be; what counts is the error of their products. With inputs x that vary
together, the error of one weight can make up for that of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..exporter.errors import IsthmusError
from ..exporter.grids import Grid, Parameters, scale_of_each

Array = np.ndarray[Any, Any]
Float32 = np.ndarray[Any, np.dtype[np.float32]]
Float64 = np.ndarray[Any, np.dtype[np.float64]]

DAMPING = 0.01
"""What is added to the diagonal, of its mean (Frantar et al., section 3.3, step 3)."""

_BLOCK = 32
"""Columns whose errors reach the later ones in one product (Frantar et al., section 3.3, step 2)."""


@dataclass(frozen=True)
class Factor:
    """How the inputs of a layer vary together, as rounding needs it: one for all weights that read the same activation.

    Attributes:
        order: The input channels, that of the highest energy last.
        coupling: (inputs, inputs) float32, in that order, 1 on the diagonal and 0 below it: the rows of the Cholesky factor R of the second
            moments, RᵀR, over their diagonal. None where no input was ever anything but 0.
    """

    order: np.ndarray[Any, np.dtype[np.intp]]
    coupling: Array | None


def factorised(gram: Array, *, damping: float = DAMPING) -> Factor:
    """The factor of second moments. It is found in float64.

    Args:
        gram: (inputs, inputs) sum of x xᵀ over the inputs x that were seen. Any positive multiple gives the same codes.
        damping: What is added to the diagonal, of its mean: above 0.

    Raises:
        IsthmusError: The second moments are not finite, or not positive definite in spite of the damping.
    """
    energy = np.diagonal(gram).astype(np.float64)
    mean = float(energy.mean())
    order = np.argsort(-energy, kind="stable")[::-1]
    if mean == 0:
        return Factor(order, None)  # no input was ever anything but 0
    if not np.isfinite(gram).all():
        raise IsthmusError("the second moments of a layer's inputs are not finite", hint="check the calibration data")
    index = torch.from_numpy(order.copy())
    moments = torch.from_numpy(np.ascontiguousarray(gram)).to(torch.float64)[index][:, index]
    moments.diagonal().add_(damping * mean)
    try:
        # PyTorch's takes half the time of numpy's.
        lower = torch.linalg.cholesky(moments)
    except RuntimeError as error:
        raise IsthmusError(
            f"the second moments of a layer's inputs have no Cholesky factor: {error}", hint="use more calibration data"
        ) from error
    return Factor(order, (lower / lower.diagonal()).to(torch.float32).T.contiguous().numpy())


def gptq(weight: Array, moments: Array | Factor, scales: Array, grid: Grid, *, damping: float = DAMPING) -> Float32:
    """The codes of a weight by GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1).

    Columns are rounded in the order of falling input energy. The error of each is made up for by those not rounded yet, in the way that
    changes the layer's outputs the least.

    With the factor RᵀR of the second moments, the error of the outputs is that of R (w - ŵ), and the rule is back substitution: the last
    column is rounded as it is, and each one before it once it has taken over Σ R_jk / R_jj (w_k - ŵ_k) of those after it (Chen et al., "The
    geometry of LLM quantization", arXiv:2507.18553: GPTQ is Babai's nearest plane). The inverse of the moments, from which the paper takes
    the same numbers, is never made. All in float32 but the factor.

    Args:
        weight: (outputs, inputs), finite.
        moments: Of the layer's inputs: their factor, or the sum that it is made of (see `factorised`).
        scales: (outputs,), or (outputs, groups) where groups of `inputs / groups` columns have a scale of their own.
        grid: A symmetric one.
        damping: See `factorised`.

    Returns:
        (outputs, inputs) codes, float32.

    Raises:
        IsthmusError: See `factorised`.
    """
    outputs, inputs = weight.shape
    factor = moments if isinstance(moments, Factor) else factorised(moments, damping=damping)
    groups = scales.reshape(outputs, -1)
    if factor.coupling is None:
        return grid.codes(weight, Parameters(scale_of_each(scales, inputs), 0.0)).astype(np.float32)
    # In units of an output's scale the rule is the same, and the columns lie one behind the other in memory.
    unit = groups.max(axis=1).astype(np.float64)
    exact = np.ascontiguousarray((weight.T / unit)[factor.order], np.float32)
    step = None if groups.shape[1] == 1 else np.repeat((groups / unit[:, None]).T, inputs // groups.shape[1], axis=0)[factor.order]
    steps = step.astype(np.float32) if step is not None else None
    codes = np.empty_like(exact)
    error = np.empty_like(exact)
    wanted = np.empty(outputs, np.float32)
    to_codes = _Rounding(grid, outputs)
    for stop in range(inputs, 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        block = exact[start:stop] + factor.coupling[start:stop, stop:] @ error[stop:]
        for column in range(stop - 1, start - 1, -1):
            np.dot(factor.coupling[column, column + 1 : stop], error[column + 1 : stop], out=wanted)
            wanted += block[column - start]
            if steps is None:
                to_codes(wanted, codes[column])
                np.subtract(exact[column], codes[column], out=error[column])
            else:
                wanted /= steps[column]
                to_codes(wanted, codes[column])
                np.subtract(exact[column], codes[column] * steps[column], out=error[column])
    restored = np.empty_like(codes)
    restored[factor.order] = codes
    return np.ascontiguousarray(restored.T)


class _Rounding:
    """To the codes of a grid as `Grid.codes` does it, of numbers in units of the scale, without an array made for each call.

    Args:
        grid: A symmetric one.
        size: How many numbers there are.
    """

    def __init__(self, grid: Grid, size: int) -> None:
        self._low, self._high, self._floating = np.float32(grid.low), np.float32(grid.high), grid.floating
        self._power = np.empty(size, np.float32)

    def __call__(self, values: Array, out: Array) -> None:
        """Writes the codes of float32 values to `out`."""
        np.minimum(values, self._high, out=out)
        np.maximum(out, self._low, out=out)
        if not self._floating:
            np.rint(out, out=out)
            return
        # A float32 without its mantissa is the power of two at or below it, and E4M3 has 8 steps from one to the next.
        power = self._power
        np.bitwise_and(out.view(np.uint32), _EXPONENT, out=power.view(np.uint32))
        np.maximum(power, _SMALLEST_POWER, out=power)
        power *= _STEP
        out /= power
        np.rint(out, out=out)
        out *= power


_EXPONENT = np.uint32(0x7F800000)
_SMALLEST_POWER = np.float32(2.0**-6)
"""E4M3's smallest normal number: the numbers below it are as far apart as those above."""
_STEP = np.float32(2.0**-3)


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
