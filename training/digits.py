"""Trains the small models that ship with weights, as rectified flows on scikit-learn's digits.

    python -m training.digits dit-digits --seed 0 -o models/weights/dit-digits.safetensors

Runs on one CPU core in minutes. The same seed, settings, torch version and processor give the same file. Progress goes to stderr; at the
end one JSON object with the figures goes to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.exporter.spec import MODELS, Arrays, ModelSpec
from isthmus.models.flow import TIME_SCALE, RectifiedFlowSampler, Step
from isthmus.models.mamba import MambaCore, causal_convolution, scan

from .data import Split, digits
from .judge import draw, judge
from .scan import differentiable_convolution, sequential_scan

NULL_SHARE = 0.1
"""Share of the labels replaced by "no class" while training, for classifier-free guidance."""


@dataclass(frozen=True)
class Settings:
    """How long and how fast to train."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup: int = 100
    ema: float = 0.995


SETTINGS = {
    "dit-digits": Settings(steps=1200, batch=64, learning_rate=2e-3),
    "sana-digits": Settings(steps=900, batch=48, learning_rate=2e-3),
    "diffussm-digits": Settings(steps=1500, batch=48, learning_rate=2e-3),
}


def flow_sampler(spec: ModelSpec) -> RectifiedFlowSampler:
    """The spec's sampler, which says how the model is conditioned.

    Raises:
        TypeError: It is no rectified-flow sampler.
    """
    if not isinstance(spec.sampler, RectifiedFlowSampler):
        raise TypeError(f"expected a model with a RectifiedFlowSampler, got {spec.sampler!r}")
    return spec.sampler


def torch_step(model: nn.Module, output: str) -> Step:
    """The model as a function from numpy arrays by name to its one output by name."""

    def step(inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            return {output: model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()}

    return step


def batches(data: Split, settings: Settings, null_label: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (B, 1, 8, 8) in [-1, 1] and labels (B,), a tenth of them `null_label`; each pass in a new order."""
    images, labels = torch.from_numpy(data.images)[:, None] * 2 - 1, torch.from_numpy(data.labels)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < settings.batch:
            order = torch.cat([order, torch.randperm(len(labels))])
        rows, order = order[: settings.batch], order[settings.batch :]
        dropped = torch.rand(len(rows)) < NULL_SHARE
        yield images[rows], torch.where(dropped, null_label, labels[rows])


def train(model: nn.Module, sampler: RectifiedFlowSampler, settings: Settings, seed: int) -> tuple[dict[str, Tensor], list[float]]:
    """Trains `model` in place.

    Returns:
        The exponential moving average of the weights, by state dict key, and the loss of each step.
    """
    torch.manual_seed(seed)
    conditions = {name: torch.from_numpy(value) for name, value in sampler.condition(np.arange(sampler.null_label + 1)).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99))
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-2, total_iters=settings.warmup)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.steps - settings.warmup))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, fall], milestones=[settings.warmup])
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    data = batches(digits()[0], settings, sampler.null_label)
    model.train()
    losses: list[float] = []
    start = time.perf_counter()
    for index in range(settings.steps):
        x0, labels = next(data)
        noise = torch.randn_like(x0)
        # Times are stratified over the batch: less noise in the loss than independent draws.
        t = (torch.arange(len(x0)) + torch.rand(len(x0))) / len(x0)
        across = t[:, None, None, None]
        inputs = {sampler.latent: (1 - across) * x0 + across * noise, sampler.time: t * TIME_SCALE}
        inputs |= {name: table[labels] for name, table in conditions.items()}
        loss = nn.functional.mse_loss(model(**inputs), noise - x0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        keep = min(settings.ema, (1 + index) / (10 + index))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - keep)
        if (index + 1) % 100 == 0:
            rate = (time.perf_counter() - start) / (index + 1)
            print(f"step {index + 1}/{settings.steps} loss {np.mean(losses[-100:]):.4f} {rate:.3f} s/step", file=sys.stderr, flush=True)
    model.eval()
    return average, losses


def use_gradients(model: nn.Module, *, wanted: bool) -> None:
    """Makes the Mamba cores of `model` compute with functions that have gradients, or with the exported operators, which have none."""
    for module in model.modules():
        if isinstance(module, MambaCore):
            module.convolve = differentiable_convolution if wanted else causal_convolution
            module.scan = sequential_scan if wanted else scan


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains one model, writes its weights, prints its figures."""
    parser = argparse.ArgumentParser(prog="python -m training.digits", description="Train a model on scikit-learn's digits.")
    parser.add_argument("model", choices=sorted(SETTINGS))
    parser.add_argument("-o", "--output", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimiser steps (default: what the shipped weights were trained with)")
    parser.add_argument("--batch", type=int, help="pictures a step (default: likewise)")
    parser.add_argument("--learning-rate", type=float, help="peak learning rate (default: likewise)")
    parser.add_argument("--per-class", type=int, default=30, help="pictures of each digit that are drawn and judged; 0 to skip")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # with more, sums are taken in another order and the file differs
    given = {key: getattr(options, key) for key in ("steps", "batch", "learning_rate") if getattr(options, key) is not None}
    settings = dataclasses.replace(SETTINGS[options.model], **given)
    spec = MODELS[options.model].spec()
    sampler = flow_sampler(spec)
    torch.manual_seed(options.seed)
    model = spec.build()
    use_gradients(model, wanted=True)
    start = time.perf_counter()
    average, losses = train(model, sampler, settings, options.seed)
    seconds = time.perf_counter() - start
    model.load_state_dict(average)
    use_gradients(model, wanted=False)
    metadata = {
        "format": "pt",
        "model": options.model,
        "script": "training/digits.py",
        "seed": str(options.seed),
        "torch": torch.__version__,
        **{key: str(value) for key, value in dataclasses.asdict(settings).items()},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in average.items()}, options.output, metadata)
    report: dict[str, Any] = {
        **metadata,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": options.output.stat().st_size,
        "seconds": round(seconds, 1),
        "first_loss": float(np.mean(losses[:20])),
        "last_loss": float(np.mean(losses[-max(1, min(100, len(losses) // 4)) :])),
    }
    if options.per_class:
        images, labels = draw(sampler, torch_step(model, sampler.output), per_class=options.per_class, seed=options.seed)
        report["figures"] = dataclasses.asdict(judge(images, labels))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
