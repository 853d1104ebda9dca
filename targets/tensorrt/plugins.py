"""Our plugins in a bundle: made for the operators of the graph and the GPUs of the engine, and checked before they are loaded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...exporter.bundle import sha256_of
from ...exporter.errors import IntegrityError, MachineError, Reason
from ...exporter.ops.onnx_forms import custom_nodes, forms
from ...exporter.ops.plugin import build as library
from .command import plugin_command
from .recipe import PLUGINS, PluginLibrary, Recipe
from .support import KERNELS

if TYPE_CHECKING:
    import onnx_ir as ir


def needed(model: ir.Model) -> tuple[str, ...]:
    """The operators of ours that a model uses."""
    return tuple(sorted({forms()[node.op_type][0].name for node in custom_nodes(model)}))


def architectures(compute_capabilities: Sequence[str]) -> tuple[str, ...]:
    """What our kernels are compiled for, for GPUs of some compute capabilities; see `support.KERNELS`."""
    return tuple(KERNELS[capability] for capability in compute_capabilities)


def copy_into(folder: Path, operators: tuple[str, ...], architectures: tuple[str, ...]) -> PluginLibrary:
    """Makes the library, or takes it from the cache, and copies it into the bundle.

    Raises:
        MachineError: This machine cannot make it: there is no compiler, no header or no Triton.
    """
    made = library.build(None, architectures, operators)
    target = folder / PLUGINS / made.name
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    shutil.copyfile(made, temporary)
    temporary.replace(target)
    return PluginLibrary(path=f"{PLUGINS}/{made.name}", sha256=sha256_of(target), operators=operators, architectures=architectures)


def to_be_made(operators: tuple[str, ...], architectures: tuple[str, ...]) -> PluginLibrary:
    """The entry of a library that the machine with the GPU makes."""
    return PluginLibrary(path=f"{PLUGINS}/{library.LIBRARY}", operators=operators, architectures=architectures)


def make_missing(folder: Path, recipe: Recipe, *, trust: bool = False) -> Recipe:
    """Makes the libraries that could not be made where the model was exported, and checks the others.

    Returns:
        The recipe with the hashes of all libraries.

    Raises:
        MachineError: One is to be made, and this machine cannot.
        IntegrityError: One is missing, or is not the one that was made with the bundle.
    """
    reasons = []
    for plugin in recipe.plugins:
        path = folder / plugin.path
        if plugin.sha256 and not path.is_file():
            reasons.append(Reason("the library of plugins is missing", where=plugin.path))
        elif plugin.sha256 and not trust and (got := sha256_of(path)) != plugin.sha256:
            reasons.append(Reason(f"sha256 is {got}, expected {plugin.sha256}: it is another version", where=plugin.path))
    if reasons:
        raise IntegrityError(
            "the bundle's plugins are not those of its recipe",
            reasons=reasons,
            hint="export again, or give --trust if you know who made it",
        )
    made = tuple(plugin if plugin.sha256 else copy_into(folder, plugin.operators, plugin.architectures) for plugin in recipe.plugins)
    return recipe.model_copy(update={"plugins": made})


def how_to_make(plugin: PluginLibrary, error: MachineError) -> str:
    """What to do about a library that could not be made here, in a sentence."""
    command = " ".join(plugin_command(plugin.operators, plugin.architectures))
    return (
        f"{plugin.path} was not made here ({error.message}); `isthmus build` makes it on the machine with the GPU, "
        f"or `{command}` does, whose output is copied to {plugin.path}"
    )
