"""A sampler as data: what has to be known of one to write it as a single graph around the model (see `passes.sampling_loop`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .spec import Arrays, Sampler, SizeRange

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

FILE = "sampler.onnx"
"""The sampling graph in a bundle, beside the file of the step."""

NOISE = "noise"
"""The input of a sampling graph that takes the starting noise (N, C, H, W), standard normal, float32."""

STEP_NOISE = "step_noise"
"""Its input for the noise that calls add, one set a call that adds some (calls, N, C, H, W), standard normal, float32."""

LATENTS = "latents"
"""Its output: the latents after the last call (N, C, H, W), float32."""

PICTURES = "pictures"
"""The name of its dynamic size N, the number of pictures."""


@dataclass(frozen=True, kw_only=True)
class LoopCall:
    """One call of the model, and what becomes of its answer.

    With `out` the answer at the latents x, guided, `before` the answer of the call before, and `base` the latents of the last call that
    advanced (the start at first), the next x is::

        keep * base + change * (out + previous * before) + noise * z,    z standard normal

    Euler and DDIM are `keep` and `change` alone. Heun's corrector is a second call that starts at the same base and takes the mean of
    two answers. Multistep sampling of consistency models (Song et al., arXiv:2303.01469, algorithm 1) has `keep` 0 and `change` 1.

    Attributes:
        time: What the model's time input gets, in each row.
        change: See the formula.
        keep: See the formula.
        previous: See the formula.
        noise: See the formula.
        advances: The result is the base of the next call. False for a predictor.
    """

    time: float
    change: float
    keep: float = 1.0
    previous: float = 0.0
    noise: float = 0.0
    advances: bool = True


@dataclass(frozen=True, kw_only=True)
class LoopSampler:
    """A sampler of a fixed number of calls.

    Classifier-free guidance (Ho and Salimans, arXiv:2207.12598) is one call on a doubled batch: the rows of the conditions given, then as
    many rows of the null condition. The answer is null + guidance * (given - null).

    Attributes:
        calls: The calls of the model, in order.
        guidance: Guidance scale, at least 1; with 1 there are no null rows.
        null: With guidance, one row (1, …) of the null condition for each input of the model beside latents and time.
        start: Standard deviation of the starting latents.
        latent: Name of the model's input for the latents (rows, C, H, W) float32.
        time: Name of its input for the time (rows,) float32.
        output: Name of its output, shaped like the latents.
    """

    calls: tuple[LoopCall, ...]
    guidance: float = 1.0
    null: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    start: float = 1.0
    latent: str = "x"
    time: str = "t"
    output: str = "sample"

    def __post_init__(self) -> None:
        if not self.calls or self.calls[0].previous or not self.calls[-1].advances:
            raise ValueError("a sampler needs calls; the first has no answer before it, and the last has to advance")
        if self.guidance < 1:
            raise ValueError(f"guidance must be at least 1, got {self.guidance}")

    @property
    def rows(self) -> int:
        """Rows of the model's batch for one picture."""
        return 2 if self.guidance > 1 else 1

    def pictures(self, batch: SizeRange) -> SizeRange:
        """How many pictures a model can draw at once that takes `batch` rows.

        Raises:
            ValueError: It does not take the rows of one.
        """
        if batch.max < self.rows:
            raise ValueError(f"a picture needs {self.rows} rows, and the model takes at most {batch.max}")
        low, high = -(-batch.min // self.rows), batch.max // self.rows
        return SizeRange(low, min(max(batch.opt // self.rows, low), high), high)


@runtime_checkable
class GraphSampler(Sampler, Protocol):
    """A sampler that can be written as one graph."""

    def loop(self) -> LoopSampler:
        """The sampler as data."""
        ...

    def loop_case(self, step: Callable[[Arrays], Arrays], rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        """Inputs of the sampling graph, and its output as the sampler computes it over `step`, by name.

        Args:
            step: One call of the model.
            rng: Gives the noise, and nothing else.
        """
        ...


@dataclass(frozen=True)
class WrittenSampler:
    """A sampling graph in a file.

    Attributes:
        inputs: Name and shape of each input; a string is a named size.
        details: Figures for the manifest, JSON values only.
        note: A sentence for the report.
    """

    inputs: Mapping[str, tuple[int | str | None, ...]]
    details: Mapping[str, object]
    note: str


def write_sampler(step: Path, sampler: LoopSampler, *, first: ir.passes.PassBase | None = None) -> WrittenSampler:
    """Writes `FILE` beside the file of a lowered step, and checks it.

    Weights that the step keeps in a file beside it (those above 1 GiB) are read from there by both graphs. Smaller ones are in both: a
    file that can be moved and loaded alone is worth more than the space of a small model.

    Args:
        step: The written graph of one step, lowered as it is to run.
        sampler: What to write around it.
        first: Rewrites the step's graph before that.

    Raises:
        UnsupportedError: The step does not fit the sampler.
        IsthmusError: The written file is not valid ONNX.
    """
    import onnx_ir as ir

    from . import onnx as onnx_files
    from .passes._rewrite import dims
    from .passes.sampling_loop import SamplingLoop

    model, path = ir.load(step), step.with_name(FILE)
    if first is not None:
        first(model)
    model = SamplingLoop(sampler)(model).model
    # Without a name for external data, tensors stay where they are: in the step's data file, or in the graph.
    ir.save(model, path)
    onnx_files.check(path, opset=model.opset_imports[""])
    inputs = {value.name or "": tuple(dims(value) or ()) for value in model.graph.inputs}
    calls, size = len(sampler.calls), path.stat().st_size
    details = {"file": FILE, "calls": calls, "guidance": sampler.guidance, "inputs": {n: list(s) for n, s in inputs.items()}, "bytes": size}
    return WrittenSampler(inputs, details, f"{FILE} ({size / 2**20:.1f} MiB) draws whole pictures, in {calls} calls of the model")
