"""What a model must say about itself to be exported: `ModelSpec`, and the `register_model` decorator.

An architecture is one file under `models/`. It holds a frozen dataclass of settings, the `torch.nn.Module`, and one function from
settings to `ModelSpec`, decorated once for each size::

    @register_model("dit-s-2", DiTConfig(depth=12, hidden_size=384, num_heads=6), summary="DiT-S/2, 33 M parameters")
    @register_model("dit-xl-2", DiTConfig(depth=28, hidden_size=1152, num_heads=16), summary="DiT-XL/2, 675 M parameters")
    def dit(config: DiTConfig) -> ModelSpec: ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .registry import Registry

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

Arrays = Mapping[str, "np.ndarray[Any, Any]"]
"""Tensors by name, as numpy arrays: what goes into a runner and what comes out."""


@dataclass(frozen=True)
class SizeRange:
    """The values that a dynamic size may take.

    Attributes:
        min: Smallest value, at least 1.
        opt: The value that engines are tuned for.
        max: Largest value.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"a range needs 1 <= min <= opt <= max, got {self.min},{self.opt},{self.max}")


@dataclass(frozen=True)
class Dynamic:
    """A dynamic axis that the user asked for: `--dynamic input:axis=min,opt,max`."""

    input: str
    axis: int
    range: SizeRange


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be from the PyTorch reference. Every bound that is set must hold, on every output of every case.

    Attributes:
        max_relative: Bound on max |error| / (max(reference) - min(reference)).
        min_psnr: Bound on the PSNR in dB, peak = the reference's range.
        atol: With `rtol`, bound |error| <= atol + rtol * |reference|, elementwise.
        rtol: See `atol`.
    """

    max_relative: float | None = None
    min_psnr: float | None = None
    atol: float | None = None
    rtol: float | None = None


@dataclass(frozen=True)
class StateDictLayout:
    """A foreign arrangement of the same weights.

    Attributes:
        name: What the layout is called, e.g. `diffusers`.
        matches: True for the set of keys of such a file.
        convert: From such a state dict to ours; keys that it does not know are passed through, so that they are reported as unexpected.
            Called first with tensors on the meta device, to compare keys and shapes before anything is read.
        config: What the `config.json` beside such weights must say for this model. A key that is absent there counts as not set.
        pth: The weights are published as a `.pth` of torch.save. Such a file is read then, if it holds nothing but tensors by name.
    """

    name: str
    matches: Callable[[frozenset[str]], bool]
    convert: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    config: Mapping[str, Any] = field(default_factory=dict)
    pth: bool = False


@dataclass(frozen=True)
class Analysis:
    """What of a model an analysis of `isthmus verify --analysis` looks at.

    Attributes:
        name: The registered analysis, e.g. `entropy`.
        outputs: The outputs that it reads, in the order that its docstring gives.
        inputs: The inputs that it reads.
        settings: What else it takes, see its docstring.
    """

    name: str
    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """Pictures that a sampler made.

    Attributes:
        images: (N, H, W) or (N, H, W, 3), float32 in [0, 1].
        captions: N short strings, e.g. the class asked for.
    """

    images: np.ndarray[Any, Any]
    captions: tuple[str, ...]


class Sampler(Protocol):
    """A sampling loop over a model that it reaches only through `step`, so that PyTorch and every artifact run the same loop.

    Attributes:
        batch: Rows of each call of the model; an artifact that does not take that many cannot be sampled from.
    """

    @property
    def batch(self) -> int: ...  # noqa: D102 - see Attributes

    def __call__(self, step: Callable[[Arrays], Arrays], rng: np.random.Generator) -> Samples:
        """Draws pictures.

        Args:
            step: One call of the model: inputs by name to outputs by name. Called with the sizes named in the ModelSpec.
            rng: The only source of randomness.
        """
        ...

    def calibration_inputs(
        self, step: Callable[[Arrays], Arrays], rng: np.random.Generator, *, size: int, batch: int
    ) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """The inputs that the model sees while it draws pictures, `size` sets of `batch` rows that cover the whole trajectory.

        Args:
            step: One call of the reference model.
            rng: The only source of randomness.
            size: Number of sets.
            batch: Rows of each.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that the toolchain needs to know of a model.

    Attributes:
        build: Makes the module with freshly initialised weights (from torch's global generator), in eval mode.
        inputs: Example inputs in the order of the module's `forward`, drawn from the generator, at the named sizes given.
        sizes: The named sizes and their defaults, e.g. `{"batch": 2}`.
        dynamic: For each input, the axes that may vary, and the named size on each, e.g. `{"x": {0: "batch"}}`.
        ranges: The range of each named size that occurs in `dynamic`.
        fixed: For axes that users may expect in `dynamic` and that are not there: what in the model fixes them, and what to do.
        outputs: Names of the outputs, in order.
        source: Where the architecture is defined: paper, and the code that it was checked against.
        tolerances: By precision, where the default tolerance does not suit the model; say why in a comment.
        weights: Trained weights that ship with isthmus (safetensors), or None for a model with random weights only.
        layouts: Foreign state dict layouts that `--weights` understands besides our own.
        sampler: How pictures are made with trained weights, or None.
        analyses: What `isthmus verify --analysis` can say of the model, beside what it can say of every model.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[np.random.Generator, Mapping[str, int]], dict[str, torch.Tensor]]
    sizes: Mapping[str, int]
    outputs: tuple[str, ...]
    source: str
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    ranges: Mapping[str, SizeRange] = field(default_factory=dict)
    fixed: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    weights: Path | None = None
    layouts: tuple[StateDictLayout, ...] = ()
    sampler: Sampler | None = None
    analyses: tuple[Analysis, ...] = ()


@dataclass(frozen=True)
class ModelEntry:
    """A registered size of an architecture.

    Attributes:
        name: The registered name.
        summary: One line for people.
        config: Its settings, a frozen dataclass.
        make: From settings to the spec.
    """

    name: str
    summary: str
    config: Any
    make: Callable[[Any], ModelSpec]

    def spec(self, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
        """The spec, with some settings replaced.

        Raises:
            ValueError: The settings contradict each other (raised by the config's own checks).
        """
        return self.make(dataclasses.replace(self.config, **(overrides or {})))


MODELS: Registry[ModelEntry] = Registry("model", "models", "register_model")

F = TypeVar("F", bound=Callable[[Any], ModelSpec])


def register_model(name: str, config: Any, *, summary: str) -> Callable[[F], F]:
    """Registers one size of an architecture. `name`, the config's arguments and `summary` must be literals (see `registry`)."""

    def decorate(make: F) -> F:
        MODELS.register(name, ModelEntry(name, summary, config, make))
        return make

    return decorate
