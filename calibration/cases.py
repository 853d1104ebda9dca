"""The inputs that an artifact is verified at: the example, a second one, and one at another size where sizes are dynamic.

A second input finds constants that a trace has baked in; another size finds sizes that it has baked in.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ..exporter.errors import IsthmusError, Reason
from ..exporter.spec import ModelSpec, SizeRange

Case = dict[str, torch.Tensor]
"""Input tensors by name, in the order of `forward`."""

_LARGEST_EXAMPLE = 4 * 2**30  # bytes; an example input above this is a mistake, and would be held several times


def cases_of_spec(spec: ModelSpec, sizes: Mapping[str, int], seed: int) -> dict[str, Case]:
    """The cases of a registered model: `example` and `second` from two seeds, `resized` from the first seed at the smallest sizes.

    Args:
        spec: The model's spec.
        sizes: The named sizes to use, as resolved.
        seed: Seed of the first case; the second uses `seed + 1`.
    """
    dynamic = {size for axes in spec.dynamic.values() for size in axes.values()}
    cases = {
        "example": spec.inputs(np.random.Generator(np.random.PCG64(seed)), sizes),
        "second": spec.inputs(np.random.Generator(np.random.PCG64(seed + 1)), sizes),
    }
    if dynamic:
        other = dict(sizes)
        taken: list[SizeRange] = []
        for size in (size for size in sizes if size in dynamic):
            other[size] = _other(sizes[size], spec.ranges[size], taken.count(spec.ranges[size]))
            taken.append(spec.ranges[size])
        cases["resized"] = spec.inputs(np.random.Generator(np.random.PCG64(seed)), other)
    return cases


def cases_of_example(
    example: Case, dynamic: Mapping[str, Mapping[int, str]], ranges: Mapping[str, SizeRange], seed: int
) -> dict[str, Case]:
    """The cases of a module that isthmus does not know, made from its one example.

    The second input is drawn from what the example shows: floating point tensors keep mean and standard deviation, integer tensors
    are permuted (so that ids stay valid), boolean tensors stay. The resized one cuts or repeats the dynamic axes.

    Args:
        example: The example inputs.
        dynamic: For each input, the axes that may vary and the named size on each.
        ranges: The range of each named size.
        seed: Seed of what is drawn.

    Raises:
        IsthmusError: An example tensor is empty, or larger than 4 GiB.
    """
    reasons = [
        Reason(f"the example has shape {tuple(t.shape)}", where=name, fix="give tensors with at least one element, below 4 GiB")
        for name, t in example.items()
        if t.numel() == 0 or t.numel() * t.element_size() > _LARGEST_EXAMPLE
    ]
    if reasons:
        raise IsthmusError("the example inputs cannot be used", reasons=reasons)
    rng = np.random.Generator(np.random.PCG64(seed + 1))
    cases = {"example": example, "second": draw_inputs(example, rng)}
    if dynamic:
        cases["resized"] = {name: _resize(tensor, dynamic.get(name, {}), ranges) for name, tensor in example.items()}
    return cases


def _other(size: int, allowed: SizeRange, before: int) -> int:
    """Another size. Sizes of one range get different ones (height and width), so that a graph that mixes them up is found out.

    Args:
        size: The example's.
        allowed: Its range.
        before: How many sizes of the same range were given their value before this one.
    """
    if before % 2 and allowed.max <= 4 * size and allowed.max != size:
        return allowed.max
    if before % 2:
        return size
    return allowed.min if allowed.min != size else allowed.max


def draw_inputs(example: Case, rng: np.random.Generator) -> Case:
    """Other inputs of a module that isthmus does not know, drawn from what its example shows; see `cases_of_example`."""
    return {name: _redraw(tensor, rng) for name, tensor in example.items()}


def _redraw(tensor: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    if tensor.is_complex() or tensor.dtype == torch.bool:
        return tensor.clone()
    if not tensor.is_floating_point():
        return tensor.flatten()[torch.from_numpy(rng.permutation(tensor.numel()))].reshape(tensor.shape)
    values = tensor.double()
    finite = values[torch.isfinite(values)]  # an infinite value is a mask's and stays where it is
    if finite.numel() == 0:
        return tensor.clone()
    deviation = float(finite.std()) if finite.numel() > 1 else 0.0
    # A constant tensor (a timestep, a scale) says nothing of its spread: move it by a little, towards the inside of its magnitude.
    if deviation == 0.0:
        return (values * (1 - 0.1 * rng.random())).to(tensor.dtype)
    drawn = torch.from_numpy(rng.standard_normal(tuple(tensor.shape))) * deviation + float(finite.mean())
    # Staying within the example's range keeps probabilities, timesteps and pictures valid.
    drawn = drawn.clamp(float(finite.min()), float(finite.max()))
    return torch.where(torch.isfinite(values), drawn, values).to(tensor.dtype)


def _resize(tensor: torch.Tensor, axes: Mapping[int, str], ranges: Mapping[str, SizeRange]) -> torch.Tensor:
    taken: list[SizeRange] = []
    for axis, size in sorted(axes.items()):
        wanted = _other(tensor.shape[axis], ranges[size], taken.count(ranges[size]))
        taken.append(ranges[size])
        tensor = tensor.index_select(axis, torch.arange(wanted) % tensor.shape[axis])
    return tensor.contiguous()
