"""Rectified flow: the interpolation that the models are trained on, the sampling loop, and the inputs seen along it.

A rectified flow (Liu et al., arXiv:2209.03003; flow matching with straight paths, Lipman et al., arXiv:2210.02747) joins a picture x0 to
Gaussian noise by the straight line x_t = (1 - t) x0 + t noise, t in [0, 1]. A model is trained to predict the line's velocity,
dx_t/dt = noise - x0; pictures are drawn by integrating the predicted velocity from t = 1 (noise) to t = 0.

Everything here is numpy and reaches the model only through `step`, so that PyTorch and every artifact run the same loop on the same noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..exporter.sampling import LATENTS, NOISE, LoopCall, LoopSampler
from ..exporter.spec import Arrays, Samples

Array = np.ndarray[Any, Any]
Step = Callable[[Arrays], Arrays]

TIME_SCALE = 1000.0
"""Models take the time as float32 in [0, 1000], the range that timestep embeddings are designed for: t * TIME_SCALE."""


def class_condition(labels: Array) -> dict[str, Array]:
    """The condition of a class-conditional model: one int64 label a picture, called `y`."""
    return {"y": labels.astype(np.int64)}


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowSampler:
    """Draws one picture for each label, with classifier-free guidance (Ho and Salimans, arXiv:2207.12598).

    The guided velocity is v_null + guidance * (v_label - v_null). Both come from one call of the model on a doubled batch, labels first,
    so `step` is always called with `batch` rows; with guidance 1 the null half is left out.

    Attributes:
        shape: (C, H, W) of one latent. C = 1 gives grey pictures, C = 3 gives RGB.
        labels: The class of each picture.
        names: The name of each class, used as captions.
        null_label: The label that stands for "no class".
        guidance: Guidance scale, at least 1.
        steps: Number of intervals between t = 1 and t = 0.
        method: `euler` (one call an interval) or `heun` (second order: two calls an interval, one in the last).
        condition: From labels (N,) int64 to the model's other inputs by name, N rows each.
        latent: Name of the input that takes the latents (N, C, H, W) float32.
        time: Name of the input that takes the time (N,) float32 in [0, 1000].
        output: Name of the output that holds the velocity, shaped like the latents.
    """

    shape: tuple[int, int, int]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    null_label: int
    guidance: float = 2.0
    steps: int = 20
    method: Literal["euler", "heun"] = "euler"
    condition: Callable[[Array], Arrays] = class_condition
    latent: str = "x"
    time: str = "t"
    output: str = "sample"

    def __post_init__(self) -> None:
        if self.shape[0] not in (1, 3):
            raise ValueError(f"pictures have 1 or 3 channels, got shape {self.shape}")
        if not self.labels or not all(0 <= label < len(self.names) for label in self.labels):
            raise ValueError(f"labels must be classes 0 to {len(self.names) - 1}, at least one, got {self.labels}")
        if self.steps < 1 or self.guidance < 1:
            raise ValueError(f"steps and guidance must be at least 1, got {self.steps} and {self.guidance}")
        if self.method not in ("euler", "heun"):
            raise ValueError(f"method must be euler or heun, got {self.method!r}")

    @property
    def batch(self) -> int:
        """The number of rows of every call of the model: 2 N with guidance, else N."""
        return len(self.labels) * (2 if self.guidance > 1 else 1)

    def __call__(self, step: Step, rng: np.random.Generator) -> Samples:
        """Draws the pictures.

        Args:
            step: One call of the model, always with `batch` rows.
            rng: Gives the starting noise, and nothing else.

        Returns:
            N pictures (N, H, W) or (N, H, W, 3), float32 in [0, 1]: the model's [-1, 1], clipped.
        """
        x = self._integrate(step, self._noise(rng))
        images: Array = np.clip((x + 1) / 2, 0, 1)
        images = images[:, 0] if self.shape[0] == 1 else images.transpose(0, 2, 3, 1)
        return Samples(images=images, captions=tuple(self.names[label] for label in self.labels))

    def loop(self) -> LoopSampler:
        """The same calls as data, from which the sampler is written as one graph."""
        calls = []
        for now, after in self._intervals():
            corrected = self.method == "heun" and after > 0
            width = after - now
            calls.append(LoopCall(time=now * TIME_SCALE, change=width, advances=not corrected))
            if corrected:
                calls.append(LoopCall(time=after * TIME_SCALE, change=width / 2, previous=1.0))
        null = self.condition(np.array([self.null_label], dtype=np.int64)) if self.guidance > 1 else {}
        return LoopSampler(calls=tuple(calls), guidance=self.guidance, null=null, latent=self.latent, time=self.time, output=self.output)

    def loop_case(self, step: Step, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        """Inputs of the sampling graph for the sampler's labels, and the latents that it has to give; see `GraphSampler.loop_case`."""
        noise = self._noise(rng)
        inputs = {NOISE: noise, **self.condition(np.array(self.labels, dtype=np.int64))}
        return inputs, {LATENTS: self._integrate(step, noise)}

    def calibration_inputs(self, step: Step, rng: np.random.Generator, *, size: int, batch: int) -> Iterator[dict[str, Array]]:
        """The inputs seen on the way, see `trajectory_inputs`."""
        return trajectory_inputs(self, step, rng, size=size, batch=batch)

    def _noise(self, rng: np.random.Generator) -> Array:
        return rng.standard_normal((len(self.labels), *self.shape), dtype=np.float32)

    def _intervals(self) -> Iterator[tuple[float, float]]:
        """Each interval's times, from 1 to 0."""
        return itertools.pairwise(np.linspace(1.0, 0.0, self.steps + 1).tolist())

    def _integrate(self, step: Step, x: Array) -> Array:
        """From noise (N, C, H, W) to latents of the same shape, float32, not clipped."""
        for now, after in self._intervals():
            width = np.float32(after - now)
            slope = self._velocity(step, x, now)
            ahead: Array = x + width * slope
            if self.method == "heun" and after > 0:
                ahead = x + width * (slope + self._velocity(step, ahead, after)) / 2
            x = ahead
        return x

    def _velocity(self, step: Step, x: Array, time: float) -> Array:
        labels = np.array(self.labels, dtype=np.int64)
        if self.guidance == 1:
            return self._call(step, x, time, labels)
        doubled = np.concatenate([labels, np.full_like(labels, self.null_label)])
        given, null = np.split(self._call(step, np.concatenate([x, x]), time, doubled), 2)
        guided: Array = null + np.float32(self.guidance) * (given - null)
        return guided

    def _call(self, step: Step, x: Array, time: float, labels: Array) -> Array:
        times = np.full(len(x), time * TIME_SCALE, dtype=np.float32)
        return np.asarray(step({self.latent: x, self.time: times, **self.condition(labels)})[self.output], dtype=np.float32)


def trajectory_inputs(
    sampler: RectifiedFlowSampler, step: Step, rng: np.random.Generator, *, size: int, batch: int
) -> Iterator[dict[str, Array]]:
    """The inputs that a model sees while it draws pictures, for calibration.

    Activations differ between noise and picture, so every batch covers the whole trajectory: the rows seen are sorted by time and cut into
    `size * batch` equal strata, of each of which one row is taken, and each batch gets one row of each `batch`-th of the trajectory.

    Args:
        sampler: How pictures are drawn; run as often as `size * batch` rows need.
        step: The reference model.
        rng: Gives the noise of the trajectories and the choice of rows.
        size: Number of batches.
        batch: Rows of each.

    Yields:
        The model's inputs by name, `batch` rows each, ordered by falling time.

    Raises:
        ValueError: `size` or `batch` is below 1.
    """
    if size < 1 or batch < 1:
        raise ValueError(f"size and batch must be at least 1, got {size} and {batch}")
    seen: list[Arrays] = []

    def recording(inputs: Arrays) -> Arrays:
        seen.append({name: value.copy() for name, value in inputs.items()})
        return step(inputs)

    while sum(len(call[sampler.time]) for call in seen) < size * batch:
        sampler(recording, rng)
    rows = {name: np.concatenate([call[name] for call in seen]) for name in seen[0]}
    # There are at least as many rows as strata, and array_split makes strata whose sizes differ by at most one: none is empty.
    strata = np.array_split(np.argsort(-rows[sampler.time], kind="stable"), size * batch)
    chosen = np.array([rng.choice(stratum) for stratum in strata]).reshape(batch, size)
    choice = rng.permuted(chosen, axis=1)
    for column in choice.T:
        yield {name: value[column] for name, value in rows.items()}


def digits_sampler(condition: Callable[[Array], Arrays] = class_condition) -> RectifiedFlowSampler:
    """The sampler of the models trained on scikit-learn's digits (8x8, grey): two pictures of each digit.

    Args:
        condition: From labels (N,) in [0, 10], 10 for "no class", to the model's inputs other than latents and time.
    """
    return RectifiedFlowSampler(
        shape=(1, 8, 8),
        labels=tuple(range(10)) * 2,
        names=tuple(str(digit) for digit in range(10)),
        null_label=10,
        guidance=1.5,
        condition=condition,
    )
