"""What the rules of `isthmus lint` look at: a lowered graph, and what is known of how it will be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import onnx
import onnx_ir as ir

from .bundle import INPUTS, inside, read_cases, read_manifest
from .errors import IntegrityError, IsthmusError, Reason, UsageError
from .manifest import MANIFEST, Manifest
from .passes._rewrite import Scope, dims, is_op, scopes
from .passes.infer_shapes import InferShapes

MODEL = "model.onnx"
"""The graph's file in the bundle of a target that takes ONNX."""

PLUGINS = "plugins"
"""The folder of the plugin libraries, beside the graph's file."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """The sizes of one input that an engine is compiled for: the shapes of its smallest, its usual and its largest tensor."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class Subject:
    """A graph and its circumstances.

    Attributes:
        model: The graph as the target's compiler gets it. Not to be changed.
        target: The target's registered name; empty when it is not known.
        manifest: The bundle's manifest; None for a graph that is in none.
        profiles: By input; None when nothing is known of the sizes, as of a file without a bundle.
        cases: By case, then by input: the shapes of the inputs that the artifact is measured with.
        plugins: The plugin libraries that come with the graph.
    """

    model: ir.Model
    target: str = ""
    manifest: Manifest | None = None
    profiles: Mapping[str, Profile] | None = None
    cases: Mapping[str, Mapping[str, Shape]] = field(default_factory=dict)
    plugins: tuple[Path, ...] = ()
    reads: ClassVar[Literal["onnx"]] = "onnx"

    @property
    def precision(self) -> str:
        """The precision that was asked for; empty when it is not known."""
        return self.manifest.precision if self.manifest else ""

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return self.model.opset_imports.get("", 0)

    def scopes(self) -> Iterator[Scope]:
        """Every graph of the model, without the bodies of our own operators, in whose place a compiler puts a plugin."""
        return scopes(self.model)

    def nodes(self, *op_types: str) -> Iterator[ir.Node]:
        """The nodes of every graph; of these operators of the default domain, when some are named."""
        for scope in self.scopes():
            yield from (node for node in scope.graph if not op_types or is_op(node, *op_types))

    def values(self) -> Iterator[tuple[ir.Value, ir.Node | None]]:
        """Every value, once, with the node that makes it: inputs, weights, and the outputs of all nodes."""
        for scope in self.scopes():
            for value in (*scope.graph.inputs, *scope.graph.initializers.values()):
                yield value, None
            for node in scope.graph:
                for value in node.outputs:
                    yield value, node

    def sizes(self, which: Literal["min", "opt", "max"] = "opt") -> dict[str, int]:
        """The value of every named size of the graph's inputs, where the profiles give one."""
        found: dict[str, int] = {}
        for value in self.model.graph.inputs:
            profile = (self.profiles or {}).get(value.name or "")
            names = dims(value)
            if profile is not None and names is not None and len(names) == len(profile.opt):
                found |= {name: size for name, size in zip(names, getattr(profile, which), strict=True) if isinstance(name, str)}
        return found

    def size(self, dim: int | str | None, which: Literal["min", "opt", "max"] = "opt") -> int | None:
        """A size as a number, when it is one or the profiles give it."""
        return evaluate(dim, self.sizes(which))


def evaluate(dim: int | str | None, sizes: Mapping[str, int]) -> int | None:
    """A size as a number: itself, or the value of an expression such as `height*width` of named sizes; None when it has none.

    onnx_ir's parser of these texts knows arithmetic and a few functions. Powers are left alone: their values can be of any length.
    """
    if not isinstance(dim, str):
        return dim
    if dim in sizes:
        return sizes[dim]
    if "**" in dim:
        return None
    try:
        value = ir.SymbolicDim(dim).evaluate(sizes)
    except (ValueError, ZeroDivisionError):
        return None
    return value if isinstance(value, int) else None


def read_subject(path: Path, target: str | None = None) -> Subject:
    """Reads a bundle, or an ONNX file with the plugins beside it. The weights are not read.

    Args:
        path: A bundle's folder, or a file.
        target: Whose compiler the graph is for; by default the bundle's.

    Raises:
        UsageError: The path is neither a bundle with an ONNX graph nor an ONNX file.
        IntegrityError: The bundle's manifest or graph cannot be used, or a file of weights is missing or outside the folder.
    """
    if path.is_dir():
        manifest = read_manifest(path)
        if MODEL not in manifest.files:
            raise UsageError(f"the bundle {path} holds no {MODEL}, and the rules read ONNX graphs", hint="give an ONNX file")
        file = inside(path, MODEL)
        if file is None or not file.is_file():
            raise IntegrityError(f"{MODEL} of the bundle {path} is missing or leads out of it", hint="export again")
        try:
            model = _load(file)
        except IsthmusError as error:
            raise IntegrityError(f"the bundle {path} is damaged: {error.message}", reasons=error.reasons, hint="export again") from error
        cases = read_cases(path / INPUTS) if INPUTS in manifest.files else {}
        libraries = [inside(path, name) for name in sorted(manifest.files) if Path(name).parts[0] == PLUGINS]
        return Subject(
            model,
            target=target or manifest.target,
            manifest=manifest,
            profiles=profiles_of(manifest),
            cases={case: {name: array.shape for name, array in arrays.items()} for case, arrays in cases.items()},
            plugins=tuple(p for p in libraries if p is not None and p.is_file()),
        )
    if not path.is_file():
        raise UsageError(f"{path} does not exist", hint="give a bundle's folder or an ONNX file")
    if path.name == MANIFEST:
        raise UsageError(f"{path} is a manifest", hint=f"give the bundle's folder, {path.parent}")
    return Subject(_load(path), target=target or "", plugins=tuple(sorted((path.parent / PLUGINS).glob("*.so"))))


def profiles_of(manifest: Manifest) -> dict[str, Profile]:
    """The profile of every input: that of the recipe in the manifest, where there is one, else what the ranges of the named sizes say.

    An input with a size whose range is not known has none.
    """
    recipe = manifest.details.get("build")
    given = recipe.get("profiles", {}) if isinstance(recipe, dict) else {}
    sizes = [{name: ends[i] for name, ends in manifest.sizes.items()} for i in range(3)]
    found: dict[str, Profile] = {}
    for tensor in manifest.inputs:
        if tensor.name in given:
            found[tensor.name] = Profile(*(tuple(given[tensor.name][end]) for end in ("min", "opt", "max")))
            continue
        low, opt, high = ([evaluate(dim, ends) for dim in tensor.shape] for ends in sizes)
        ends = [tuple(size for size in end if size is not None) for end in (low, opt, high)]
        if all(len(end) == len(tensor.shape) for end in ends):
            found[tensor.name] = Profile(*ends)
    return found


def _load(path: Path) -> ir.Model:
    try:
        model = ir.load(path)
        if not model.opset_imports:
            raise ValueError("it names no operator set")
        reasons = [reason for tensor in _external(model) if (reason := _misplaced(path.parent, str(tensor.location)))]
        if not reasons:
            onnx.checker.check_model(str(path))  # so that rules may rely on what the operators' schemas say
            InferShapes()(model)
    except Exception as error:  # protobuf and onnx_ir raise what they like
        raise UsageError(f"{path} is not valid ONNX: {str(error).partition(chr(10))[0]}", hint="give a bundle or an ONNX file") from error
    if reasons:
        raise IntegrityError(f"the weights of {path} cannot be used", reasons=dict.fromkeys(reasons))
    return model


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every tensor whose bytes are in another file."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value


def _misplaced(folder: Path, location: str) -> Reason | None:
    path = inside(folder, location)
    if path is None:
        return Reason("the path leads out of the folder", where=location)
    return None if path.is_file() else Reason("the file is missing", where=location)
