"""The recipe as a command line of NVIDIA's own tools, for those who build without isthmus."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from .recipe import Profile, Recipe

FILE = "build.sh"
TIMING_CACHE = "timing.cache"
LAYERS = "layers.json"

_TOOLS = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}


def command(recipe: Recipe) -> list[str]:
    """The arguments of `trtexec`, or of `tensorrt_rtx`, that build the same engine; paths are relative to the bundle.

    The options are those of `samples/common/sampleOptions.cpp` of TensorRT 11.1 (github.com/NVIDIA/TensorRT), and `--computeCapabilities`
    of TensorRT-RTX's documentation ("CPU-Only AOT and TensorRT-RTX Engines"). Networks are strongly typed by default since TensorRT 11.
    """
    arguments = [_TOOLS[recipe.library], f"--onnx={recipe.model}", f"--saveEngine={recipe.engine}", "--skipInference"]
    arguments += [f"--dynamicPlugins={plugin.path}" for plugin in recipe.plugins]
    if recipe.plugin_override:
        arguments.append("--enablePluginOverride")
    if recipe.profiles:
        arguments += [f"--{end}Shapes={_shapes(recipe.profiles, end)}" for end in ("min", "opt", "max")]
    if recipe.workspace:
        arguments.append(f"--memPoolSize=workspace:{recipe.workspace}M")
    arguments.append("--profilingVerbosity=detailed")
    if recipe.library == "tensorrt":
        return [*arguments, f"--timingCacheFile={TIMING_CACHE}", f"--exportLayerInfo={LAYERS}"]
    arguments += [f"--setPluginsToSerialize={plugin.path}" for plugin in recipe.plugins]
    return [*arguments, f"--computeCapabilities={','.join(c.replace('.', '') for c in recipe.compute_capabilities)}"]


def script(recipe: Recipe) -> str:
    """The text of `build.sh`."""
    lines = ["#!/bin/sh", "# Builds the engine as `isthmus build` does, with NVIDIA's own tool, which does not check what it built."]
    lines += [
        f"# {plugin.path} was not made with this bundle. Make it here first, and copy it there:\n"
        f"#   {shlex.join(plugin_command(plugin.operators, plugin.architectures))}"
        for plugin in recipe.plugins
        if not plugin.sha256
    ]
    first, *rest = command(recipe)
    return "\n".join([*lines, "set -eu", 'cd "$(dirname "$0")"', " \\\n  ".join([first, *map(shlex.quote, rest)]), ""])


def plugin_command(operators: tuple[str, ...], architectures: tuple[str, ...]) -> list[str]:
    """The command that makes our plugin library and prints its path."""
    chosen = [f"--operator={name}" for name in operators] + [f"--arch={name}" for name in architectures]
    return ["python", "-m", "isthmus.exporter.ops.plugin", *chosen]


def _shapes(profiles: Mapping[str, Profile], end: str) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, getattr(profile, end)))}" for name, profile in profiles.items())
