"""The recipe by which an engine is built from the bundle's ONNX file, on this machine or on another one."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...exporter.errors import IntegrityError, IsthmusError, Reason
from ...exporter.manifest import Manifest
from ...exporter.ops.gpu import expressions
from ...exporter.spec import SizeRange

MODEL = "model.onnx"
PLUGINS = "plugins"
Library = Literal["tensorrt", "tensorrt-rtx"]

ENGINES: Mapping[Library, str] = {"tensorrt": "engine.plan", "tensorrt-rtx": "engine.rtx.plan"}
"""The names differ, so that a plan of TensorRT-RTX is never taken for an engine of TensorRT."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Profile(_Strict):
    """The shapes of one input that an engine takes.

    Attributes:
        min: Smallest sizes.
        opt: The sizes that the engine is tuned for.
        max: Largest sizes.
    """

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class PluginLibrary(_Strict):
    """A library of plugins that the graph needs.

    Attributes:
        path: Within the bundle.
        sha256: Of the file; empty when it could not be made where the model was exported, and is made by the build.
        operators: Names of the operators whose kernels it holds.
        architectures: What they are compiled for, such as `sm_90a`.
    """

    path: str
    sha256: str = ""
    operators: tuple[str, ...]
    architectures: tuple[str, ...]


class Fp8Layer(_Strict):
    """A node that has to compute in FP8.

    Attributes:
        node: Its name in the ONNX file.
        module: The PyTorch module that it comes from.
        operands: Number of its inputs that are quantised activations: 1 for a layer with a weight, 2 for a product of attention.
    """

    node: str
    module: str
    operands: int = Field(1, ge=1, le=2)


class Recipe(_Strict):
    """How an engine is built.

    Attributes:
        library: What builds it.
        model: The ONNX file, within the bundle.
        engine: The file to write, within the bundle.
        profiles: For each input with dynamic sizes, its shapes.
        workspace: Limit of the builder's workspace in MiB; 0 for none.
        plugins: Libraries to load before the file is parsed.
        plugin_override: Nodes of our domain become plugins although the file holds bodies for them.
        compute_capabilities: Of the GPUs that the engine is for, such as `9.0`.
        timing_cache: The file that keeps the builder's measurements; empty for the one in the user's cache folder.
        timeout: Seconds after which a build is ended.
        fp8: The nodes that have to compute in FP8.
        versions: Of the tools that wrote the recipe.
    """

    library: Library
    model: str = MODEL
    engine: str
    profiles: dict[str, Profile] = {}
    workspace: int = Field(0, ge=0)
    plugins: tuple[PluginLibrary, ...] = ()
    plugin_override: bool = False
    compute_capabilities: tuple[str, ...]
    timing_cache: str = ""
    timeout: int = Field(3600, ge=1)
    fp8: tuple[Fp8Layer, ...] = ()
    versions: dict[str, str] = {}


def recipe_of(manifest: Manifest, library: Library) -> Recipe:
    """The recipe in a manifest.

    Raises:
        IntegrityError: There is none, it is not one that this version understands, or it is for the other library.
    """
    try:
        recipe = Recipe.model_validate(manifest.details.get("build"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the recipe"
        raise IntegrityError(f"the bundle holds no recipe for an engine: {where}: {first['msg']}", hint="export again") from error
    if recipe.library != library or manifest.target != library:
        raise IntegrityError(
            f"the bundle is for {manifest.target} and its recipe for {recipe.library}, expected {library}",
            hint=f"an engine for these GPUs is built from a bundle of `isthmus export --target {library}`",
        )
    for name in (recipe.model, recipe.engine, *(plugin.path for plugin in recipe.plugins)):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise IntegrityError(f"the recipe's path {name} leads out of the bundle", hint="export again")
    return recipe


Size = int | str | None


def profiles_of(inputs: Iterable[tuple[str, Iterable[Size]]], sizes: Mapping[str, SizeRange]) -> tuple[dict[str, Profile], list[Reason]]:
    """The shapes that an engine has to take, from the ranges of the named sizes.

    A size may be an expression of named sizes (`2*h`), as long as it grows with them: a profile is one smallest and one largest shape.

    Args:
        inputs: Name and shape of each input; a string is a named size or an expression, None a size without a name.
        sizes: The range of each named size.

    Returns:
        The profile of each input that has a dynamic size, and a reason for each size that no profile can express.
    """
    profiles: dict[str, Profile] = {}
    reasons: list[Reason] = []
    for name, shape in inputs:
        dims = list(shape)
        ends: list[tuple[int, int, int]] = []
        for axis, size in enumerate(dims):
            try:
                ends.append((size, size, size) if isinstance(size, int) else _ends(size, sizes))
            except IsthmusError as error:
                fix = error.hint or f"give its range with --dynamic {name}:{axis}=min,opt,max"
                reasons.append(Reason(f"axis {axis} of the input has no range: {error.message}", where=name, fix=fix))
        if len(ends) == len(dims) and not all(isinstance(size, int) for size in dims):
            low, opt, high = zip(*ends, strict=True)
            profiles[name] = Profile(min=low, opt=opt, max=high)
    return profiles, reasons


def _ends(size: str | None, sizes: Mapping[str, SizeRange]) -> tuple[int, int, int]:
    """Smallest, tuned and largest value of a size."""
    if size is None:
        raise IsthmusError("the size has no name")
    used = sorted(expressions.names(size))
    if unknown := [name for name in used if name not in sizes]:
        raise IsthmusError(f"its size is {size}, and {', '.join(unknown)} has no range")
    low, opt, high = (int(expressions.evaluate(size, {name: getattr(sizes[name], end) for name in used})) for end in ("min", "opt", "max"))
    if not _grows(size, {name: sizes[name].min for name in used}) or low < 1:
        raise IsthmusError(
            f"its size is {size}, which does not grow with {', '.join(used)} from at least 1",
            hint="export the model so that the input's size is a name of its own, or fix the sizes",
        )
    return low, opt, high


def _grows(text: str, smallest: Mapping[str, int]) -> bool:
    """Whether an expression never shrinks when a name grows, which holds for sums, products and quotients of what is not negative."""

    def grows(node: ast.expr) -> bool:
        match node:
            case ast.Constant() | ast.Name():
                return True
            case ast.BinOp(left=left, op=ast.Add() | ast.Mult(), right=right):
                return grows(left) and grows(right)
            case ast.BinOp(left=left, op=ast.Sub() | ast.FloorDiv(), right=ast.Constant(value=int(amount))):
                return grows(left) and amount > 0 and int(expressions.evaluate(ast.unparse(node), smallest)) >= 0
            case ast.Call(func=ast.Name(id="min" | "max"), args=[left, right]):
                return grows(left) and grows(right)
        return False

    return grows(expressions.parse(text))
