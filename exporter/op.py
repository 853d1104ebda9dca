"""An operator of our own: `CustomOp`, its schema, its parts, and the `register_op` decorator.

An operator is one folder under `exporter/ops/`. Its `__init__.py` holds the schema, a class decorated with `register_op`; every other part
is a file of that folder whose name is fixed by `PARTS`, beside its twins. What is shared by several operators stands one level up. A part
that cannot exist is named in `lacks` with the reason; any other part that is missing fails the sweep of the tests, by name.

Importing the schema imports neither torch nor an SDK; `CustomOp.part` imports a part when it is used.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .errors import IsthmusError, Reason, UsageError
from .registry import Registry

if TYPE_CHECKING:
    import numpy as np

Arrays = Mapping[str, "np.ndarray[Any, Any] | None"]
"""Inputs of an operator by name; an optional one that is not given is None or absent."""

DOMAIN = "isthmus"
"""The namespace of the torch operators and the domain of the ONNX nodes."""

VERSION = 1
"""Version of the ONNX domain."""


@dataclass(frozen=True)
class Part:
    """A way in which an operator exists.

    Attributes:
        name: What it is called in `isthmus list ops` and in the tests.
        file: Its file in the operator's folder.
        summary: What it is for.
    """

    name: str
    file: str
    summary: str


PARTS = {
    part.name: part
    for part in (
        Part("reference", "reference.py", "float64, token by token, as the formula reads"),
        Part("cases", "cases.py", "the inputs that every implementation must pass"),
        Part("torch", "eager.py", "the torch operator: fake kernel, CPU kernel, single step"),
        Part("onnx", "onnx_function.py", "the ONNX node's body, of standard operators"),
        Part("onnx27", "onnx27.py", "the standard operator of opset 27"),
        Part("onnxruntime", "kernel.cpp", "the native CPU kernel, for ONNX Runtime and torch"),
        Part("gpu", "gpu.py", "the GPU kernels, in Triton"),
        Part("tensorrt", "tensorrt.cpp", "the TensorRT plugin (IPluginV3)"),
        Part("tensorrt-quick", "tensorrt_quick.py", "the TensorRT 11 plugin with ahead-of-time kernels"),
        Part("coreml", "coreml.py", "the Core ML lowering"),
        Part("coreai", "coreai.py", "the Core AI lowering"),
    )
}
"""Every part that an operator has, in the order in which they are listed."""


@dataclass(frozen=True)
class Argument:
    """A tensor that goes in or comes out.

    Attributes:
        name: Its name in every part.
        shape: Its sizes: a name, a number, or a product of names (`groups*state`), which share their values across the arguments.
        wide: It is float32 (float64 beside float64 activations) whatever the dtype of the activations is. States and parameters are.
        optional: It may be left out.
    """

    name: str
    shape: tuple[str | int, ...]
    wide: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """A setting that is constant in a graph.

    Attributes:
        name: Its name in every part.
        type: bool, int, float or str.
        default: Its value when it is not given; None when it must be.
    """

    name: str
    type: type
    default: Any = None


@dataclass(frozen=True)
class Form:
    """An ONNX node type of the domain `isthmus`. A form has no optional inputs, because a function body cannot ask whether one is there:
    the presence of an input that has no neutral value selects another form.

    Attributes:
        op_type: The node's type.
        inputs: The operator's arguments that the node takes, in order. Those of the operator that the form lacks are None.
        fixed: Attributes that the form stands for; the node carries the others.
    """

    op_type: str
    inputs: tuple[str, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Inputs that every implementation of an operator must pass.

    Attributes:
        name: What is hard about it; unique within the operator.
        make: Makes the inputs in float64 from a generator.
        attributes: Every attribute without a default, and those that differ from it.
    """

    name: str
    make: Callable[[np.random.Generator], Arrays]
    attributes: Mapping[str, Any] = field(default_factory=dict)


class CustomOp(ABC):
    """The schema of an operator, and the way to its parts.

    Class attributes:
        name: The registered name, that of the torch operator `isthmus::name`.
        summary: One line for people.
        inputs: What goes in.
        outputs: What comes out, all of it always.
        attributes: Settings.
        forms: The ONNX node types.
        lacks: The parts that cannot exist, and why.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    inputs: ClassVar[tuple[Argument, ...]]
    outputs: ClassVar[tuple[Argument, ...]]
    attributes: ClassVar[tuple[Attribute, ...]] = ()
    forms: ClassVar[tuple[Form, ...]]
    lacks: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def constraints(self, sizes: Mapping[str, int], given: frozenset[str], attributes: Mapping[str, Any]) -> Iterator[Reason]:
        """What the shapes alone do not say.

        Args:
            sizes: The value of every name in the shapes.
            given: The inputs that are there.
            attributes: Every attribute.
        """

    @abstractmethod
    def form(self, given: frozenset[str], attributes: Mapping[str, Any]) -> Form:
        """The ONNX node type for these inputs and attributes."""

    def sizes(self, attributes: Mapping[str, Any]) -> dict[str, int]:  # noqa: ARG002 - for operators whose shapes need it
        """The names in the shapes that attributes determine."""
        return {}

    # Below: what follows from the schema.

    def part(self, name: str) -> ModuleType:
        """Imports a part.

        Raises:
            IsthmusError: The operator has no such part.
        """
        if not self.has(name):
            reason = self.lacks.get(name, f"{self.folder / PARTS[name].file} does not exist")
            raise IsthmusError(f"operator {self.name} has no part {name!r}: {reason}")
        return importlib.import_module(f"{type(self).__module__}.{Path(PARTS[name].file).stem}")

    def has(self, name: str) -> bool:
        """Whether the part's file exists."""
        return (self.folder / PARTS[name].file).is_file()

    @property
    def folder(self) -> Path:
        """Where the operator's parts are."""
        return Path(__file__).parent / "ops" / self.name

    def resolve(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Every attribute, defaults filled in.

        Raises:
            UsageError: One is unknown or missing.
        """
        known = {a.name: a for a in self.attributes}
        reasons = [
            Reason(f"{self.name} has no attribute {name!r}", fix=f"known are {', '.join(known)}")
            for name in attributes
            if name not in known
        ]
        full = {name: attributes.get(name, a.default) for name, a in known.items()}
        reasons += [Reason(f"{self.name} needs the attribute {name!r}") for name, value in full.items() if value is None]
        if reasons:
            raise UsageError(f"the attributes of {self.name} are wrong", reasons=reasons)
        return full

    def infer(self, shapes: Mapping[str, tuple[Any, ...]], attributes: Mapping[str, Any]) -> dict[str, Any]:
        """The value of every name in the shapes, from the inputs that are there.

        Args:
            shapes: Shape of each given input. Sizes may be symbolic; those that one name stands for are compared.
            attributes: Every attribute.

        Raises:
            UsageError: The inputs do not fit each other; every reason is listed.
        """
        sizes: dict[str, Any] = dict(self.sizes(attributes))
        reasons: list[Reason] = []
        required = [a for a in self.inputs if not a.optional]
        reasons += [Reason("is missing", where=a.name) for a in required if a.name not in shapes]
        # Plain names first: a product needs all but one of its factors.
        pending = [(a, i, dim) for a in self.inputs if a.name in shapes for i, dim in enumerate(a.shape)]
        for a in self.inputs:
            if a.name in shapes and len(shapes[a.name]) != len(a.shape):
                got = tuple(shapes[a.name])
                reasons.append(Reason(f"has shape {got}, expected ({', '.join(map(str, a.shape))})", where=a.name))
        if not reasons:
            for a, i, dim in sorted(pending, key=lambda p: "*" in str(p[2]) or "-" in str(p[2])):
                reasons += _unify(a, dim, shapes[a.name], i, sizes)
        if not reasons:
            reasons += self.constraints(sizes, frozenset(shapes), attributes)
        if reasons:
            raise UsageError(f"the inputs of {self.name} do not fit", reasons=reasons)
        return sizes

    def output_shapes(self, sizes: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """The shape of every output, for the sizes that `infer` found."""
        return {a.name: tuple(evaluate(dim, sizes) for dim in a.shape) for a in self.outputs}


def evaluate(dim: str | int, sizes: Mapping[str, Any]) -> Any:
    """The value of a size: a number, a name, a product of names (`heads*key`), or a name less one (`width-1`)."""
    if isinstance(dim, int):
        return dim
    if dim.endswith("-1"):
        return sizes[dim[:-2]] - 1
    value: Any = 1
    for factor in dim.split("*"):
        value = value * sizes[factor]
    return value


def _unify(a: Argument, dim: str | int, shape: tuple[Any, ...], i: int, sizes: dict[str, Any]) -> Iterator[Reason]:
    got = shape[i]
    if isinstance(dim, int) or dim.endswith("-1"):
        expected = evaluate(dim, sizes)
        if got != expected:
            yield Reason(f"has {got} on axis {i}, expected {expected}" + (f" ({dim})" if dim != expected else ""), where=a.name)
        return
    factors = dim.split("*")
    unknown = [f for f in factors if f not in sizes]
    known: Any = 1
    for factor in factors:
        known = known * sizes.get(factor, 1)
    if not unknown:
        if got != known:
            yield Reason(f"has {got} on axis {i}, expected {known} ({dim})", where=a.name)
    elif len(unknown) > 1:
        yield Reason(f"has {got} on axis {i}; {' and '.join(unknown)} are not determined", where=a.name)
    elif len(factors) > 1 and got % known != 0:
        yield Reason(f"has {got} on axis {i}, expected a multiple of {known} ({dim})", where=a.name)
    else:
        sizes[unknown[0]] = got // known if len(factors) > 1 else got


OPS: Registry[CustomOp] = Registry("operator", "exporter/ops", "register_op")

C = TypeVar("C", bound=type[CustomOp])


def register_op(name: str, *, summary: str) -> Callable[[C], C]:
    """Registers an operator. `name`, which is also its folder's, and `summary` must be literals (see `registry`)."""

    def decorate(cls: C) -> C:
        cls.name = name
        cls.summary = summary
        OPS.register(name, cls())
        return cls

    return decorate
