"""Nodes that need a plugin, and the libraries that hold it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from ....exporter.lint import Match, register_rule
from ....exporter.op import DOMAIN, OPS
from ....exporter.subject import Subject

STANDARD = ("LinearAttention", "CausalConvWithState")
"""Operators of opset 27 that TensorRT's parser looks for among the plugins."""


def is_plugin(node: ir.Node) -> bool:
    """Whether a plugin computes the node: one of ours, or a standard operator that TensorRT leaves to plugins."""
    return node.domain == DOMAIN or (node.domain in ("", "ai.onnx") and node.op_type in STANDARD)


@register_rule(
    "TRT-501",
    summary="node of an unknown domain",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="give the model a function of that name, or write the node with standard operators",
    source="measured with TensorRT-RTX 1.7.1: plugin not found",
)
def unknown_domain(subject: Subject) -> Iterator[Match]:
    """The domain is not the standard one, and the name is neither an operator of ours nor of ONNX nor a function of the model."""
    for node in subject.nodes():
        if _is_foreign(subject, node) and not _is_standard(node.op_type):
            yield Match(f"{node.domain}::{node.op_type} is no operator of ONNX, and the model has no function for it", node)


@register_rule(
    "TRT-502",
    summary="node of an unknown domain with the name of a standard operator",
    effect="other result",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="write the node with standard operators",
    source="measured with TensorRT-RTX 1.7.1: its parser does not look at the domain, and takes such a node for the standard one",
)
def namesake(subject: Subject) -> Iterator[Match]:
    """The domain is not the standard one, and ONNX has an operator of that name."""
    for node in subject.nodes():
        if _is_foreign(subject, node) and _is_standard(node.op_type):
            yield Match(f"{node.domain}::{node.op_type} is taken for ONNX's {node.op_type}", node)


def _is_foreign(subject: Subject, node: ir.Node) -> bool:
    return node.domain not in ("", "ai.onnx", DOMAIN) and node.op_identifier() not in subject.model.functions


def _is_standard(op_type: str) -> bool:
    return bool(onnx.defs.has(op_type))


@register_rule(
    "TRT-503",
    summary="node of ours without its plugin",
    effect="refused",
    targets=("tensorrt", "tensorrt-rtx"),
    fix="export again on a machine where `isthmus list ops` shows the plugin as ready, or build the bundle with `isthmus build`",
    source="an operator of this package; the parser asks the libraries in plugins/ for a creator of the node's name",
)
def plugin_library(subject: Subject) -> Iterator[Match]:
    """No library that comes with the graph names the node's type, and the recipe does not build one."""
    wanted = {node.op_type for node in subject.nodes() if is_plugin(node)}
    missing = wanted - {name for name in wanted if any(_names(path, name) for path in subject.plugins)} - _built_later(subject)
    for node in subject.nodes():
        if is_plugin(node) and node.op_type in missing:
            got = "the libraries in plugins/ do not hold it" if subject.plugins else "there is no library in plugins/"
            yield Match(f"{node.op_type} is computed by a plugin, and {got}", node)


def _names(library: Path, op_type: str) -> bool:
    """Whether the library holds the name as a C string. Linkers share the ends of strings, so that only the end is looked for."""
    with library.open("rb") as file:
        if library.stat().st_size == 0:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(op_type.encode() + b"\0") >= 0


def _built_later(subject: Subject) -> set[str]:
    """The node types of operators whose library the recipe names and leaves to the build to make: it has no hash yet."""
    recipe = subject.manifest.details.get("build") if subject.manifest else None
    libraries = recipe.get("plugins", []) if isinstance(recipe, dict) else []
    operators = {name for library in libraries if not library.get("sha256") for name in library.get("operators", [])}
    return {form.op_type for name in operators & set(OPS) for form in OPS[name].forms} | (set(STANDARD) if operators else set())
