"""The code that touches TensorRT's Python module: from an ONNX file to an engine. It runs in a process of its own: see `process`.

`tensorrt` and `tensorrt_rtx` have the same interface for all that is used here, so the module is an argument. Sources of what is called:
the modules' own docstrings (TensorRT-RTX 1.7.1) and docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api (TensorRT 11.4).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict

from ...exporter.errors import Reason
from ...exporter.op import DOMAIN
from .recipe import Recipe

_LIMIT = 64
"""Most reasons and warnings that are kept: a library that repeats itself says nothing more."""


class Request(BaseModel):
    """What the compiling process is asked for.

    Attributes:
        modules: Names of the Python module, the first that can be imported is used.
        folder: The bundle's.
        recipe: How the engine is built.
        timing_cache: The builder's measurements, read and written; None for none.
        module_key: The metadata property of a node that holds its PyTorch module.
        layers: Where the layers of the built engine are written as JSON, which needs a GPU; None for nowhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    modules: tuple[str, ...]
    folder: Path
    recipe: Recipe
    module_key: str
    timing_cache: Path | None = None
    layers: Path | None = None


class Outcome(BaseModel):
    """What came of it.

    Attributes:
        reasons: Why there is no engine; empty when there is one.
        version: Of the module.
        network_layers: Number of layers that the parser made.
        engine_bytes: Size of the engine.
        seconds: Time of the builder.
        peak_rss: Most memory that the process held, in bytes.
        warnings: What the library warned of, each once.
        plugins: Node types that are run by plugins.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reasons: tuple[Reason, ...] = ()
    version: str = ""
    network_layers: int = 0
    engine_bytes: int = 0
    seconds: float = 0.0
    peak_rss: int = 0
    warnings: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()


class _RefusedError(Exception):
    def __init__(self, reasons: Sequence[Reason]) -> None:
        super().__init__("; ".join(map(str, reasons)))
        self.reasons = tuple(reasons)


@dataclass(frozen=True)
class Node:
    """A node of the file, as far as messages and plugins need it.

    Attributes:
        op_type: Its operator.
        module: Its PyTorch module.
        plugin: Version and namespace that its plugin is looked up by; None for an operator that is not ours.
    """

    op_type: str
    module: str
    plugin: tuple[str, str] | None


def compile_engine(trt: Any, request: Request) -> Outcome:
    """Builds the engine of a recipe and writes it into the bundle.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.
        request: What to build.

    Returns:
        The outcome. Where the library refuses, its `reasons` name the PyTorch modules that they concern, and no file is written.
    """
    log = make_log(trt)
    try:
        return _compile(trt, request, log)
    except _RefusedError as error:
        return Outcome(reasons=error.reasons[:_LIMIT], version=str(trt.__version__), warnings=tuple(log.warnings))


def make_log(trt: Any) -> Any:
    """A logger that prints to stderr and keeps `errors` and `warnings`; the base class is the module's."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the module is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: dict[str, None] = {}

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg)
            elif severity == trt.ILogger.Severity.WARNING and len(self.warnings) < _LIMIT:
                self.warnings[msg] = None
            if severity != trt.ILogger.Severity.VERBOSE:
                print(f"[{severity.name}] {msg}", file=sys.stderr, flush=True)

    return Log()


def load_plugins(trt: Any, folder: Path, paths: Iterable[str]) -> None:
    """Loads the bundle's plugin libraries into the registry.

    Raises:
        _RefusedError: The library does not take them.
    """
    registry = trt.get_plugin_registry()
    reasons = [
        Reason("the library of plugins was not loaded: it cannot be opened, or its plugins are registered already", where=path)
        for path in paths
        if registry.load_library(str(folder / path)) is None
    ]
    if reasons:
        raise _RefusedError(reasons)


def _compile(trt: Any, request: Request, log: Any) -> Outcome:
    recipe, path = request.recipe, request.folder / request.recipe.model
    nodes = read_nodes(path, request.module_key)
    load_plugins(trt, request.folder, [plugin.path for plugin in recipe.plugins])
    _check_plugins(trt, recipe, nodes)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if recipe.plugin_override:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    # From the file and not from its bytes: the weights may lie in a file beside it.
    if not parser.parse_from_file(str(path)):
        raise _RefusedError(_parser_reasons(parser, nodes) or _logged_reasons(log, nodes, "the parser refused the file"))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector knows names only
    if recipe.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace * 2**20)
    if recipe.profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in recipe.profiles.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        config.add_optimization_profile(profile)
    if recipe.library == "tensorrt-rtx":
        _set_capabilities(trt, config, recipe.compute_capabilities)
        if recipe.plugins:
            config.plugins_to_serialize = [str(request.folder / plugin.path) for plugin in recipe.plugins]
    if request.timing_cache is not None:
        _read_timing_cache(config, request.timing_cache)
    start = time.monotonic()
    engine = request.folder / recipe.engine
    with atomic_file(engine) as file:
        writer = _make_writer(trt, file)
        # Piece by piece, because the plan in memory would be one more copy of the weights.
        done = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:
            raise writer.error
        if not done:
            raise _RefusedError(_logged_reasons(log, nodes, "the builder made no engine"))
    seconds = time.monotonic() - start
    if request.timing_cache is not None:
        write_atomically(request.timing_cache, config.get_timing_cache().serialize())
    if request.layers is not None:
        write_atomically(request.layers, describe_layers(trt, engine.read_bytes(), recipe, log).encode())
    return Outcome(
        version=str(trt.__version__),
        network_layers=network.num_layers,
        engine_bytes=engine.stat().st_size,
        seconds=seconds,
        warnings=tuple(log.warnings),
        plugins=tuple(sorted({node.op_type for node in nodes.values() if node.plugin})) if recipe.plugins else (),
    )


def _make_writer(trt: Any, file: BinaryIO) -> Any:
    """What the builder writes its plan into. An exception must not pass through the library, which would end the process."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]  # as for the logger
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()


def describe_layers(trt: Any, plan: bytes, recipe: Recipe, log: Any) -> str:
    """The layers of a built engine as TensorRT's inspector describes them, JSON; loads the engine, and so needs a GPU."""
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        raise _RefusedError(_logged_reasons(log, {}, "the engine was built and cannot be loaded"))
    # Without the shapes of a run the inspector leaves out the datatypes of whatever depends on them (NvInferRuntime.h, IEngineInspector).
    for name, shapes in recipe.profiles.items():
        if not context.set_input_shape(name, shapes.opt):
            raise _RefusedError([Reason(f"the engine does not take the shape {shapes.opt} of its own profile", where=name)])
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def read_nodes(path: Path, module_key: str) -> dict[str, Node]:
    """The nodes of a file by name, subgraphs included, the bodies of functions not."""
    import onnx

    found: dict[str, Node] = {}

    def visit(graph: Any) -> None:
        for node in graph.node:
            attributes = {a.name: a for a in node.attribute}
            texts = {n: attributes[n].s.decode() if n in attributes else "" for n in ("plugin_version", "plugin_namespace")}
            plugin = (texts["plugin_version"] or "1", texts["plugin_namespace"]) if node.domain == DOMAIN else None
            module = next((p.value for p in node.metadata_props if p.key == module_key), "")
            found[node.name] = Node(node.op_type, module, plugin)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g)

    visit(onnx.load(path, load_external_data=False).graph)
    return found


def _check_plugins(trt: Any, recipe: Recipe, nodes: Mapping[str, Node]) -> None:
    """Refuses nodes whose plugin is not registered in their version; a body in the file would silently stand in for it."""
    if not recipe.plugin_override:
        return
    registry = trt.get_plugin_registry()
    known = [(creator.name, creator.plugin_version, creator.plugin_namespace) for creator in registry.all_creators]
    reasons: dict[Reason, None] = {}
    for node in nodes.values():
        if node.plugin is None or (node.op_type, *node.plugin) in known:
            continue
        others = [f"version {version} in namespace {space!r}" for name, version, space in known if name == node.op_type]
        found = f"found {' and '.join(others)}" if others else "there is none of that name"
        what = f"{node.op_type} needs a plugin of version {node.plugin[0]} in namespace {node.plugin[1]!r}; {found}"
        reasons[Reason(what, where=node.module, fix="export again, so that model and plugins are of one version of isthmus")] = None
    if reasons:
        raise _RefusedError(list(reasons))


def _parser_reasons(parser: Any, nodes: Mapping[str, Node]) -> list[Reason]:
    """The parser's errors; and, because it stops at the first, every other node whose operator it does not know."""
    reasons: dict[Reason, None] = {}
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        name, operator = error.node_name(), error.node_operator()
        what = f"{operator or 'the file'}: {_one_line(error.desc())}"
        reasons[Reason(f"{what} (node {name})" if name else what, where=_module(nodes, name))] = None
    said = {parser.get_error(index).node_operator() for index in range(parser.num_errors)}
    for name, node in nodes.items():
        if node.plugin is None and node.op_type not in said and not parser.supports_operator(node.op_type):
            reasons[Reason(f"{node.op_type} is not supported (node {name})", where=node.module)] = None
    return list(reasons)


def _logged_reasons(log: Any, nodes: Mapping[str, Node], otherwise: str) -> list[Reason]:
    """The logged errors, with the modules of the nodes that they name."""
    modules = {name: node.module for name, node in nodes.items() if len(name) > 2}
    reasons: dict[Reason, None] = {}
    for message in log.errors:
        words = set(re.split(r"[\s,;:'\"()\[\]{}]+", message))
        where = ", ".join(dict.fromkeys(modules[name] or name for name in modules if name in words))
        reasons[Reason(_one_line(message), where=where)] = None
    return list(reasons) or [Reason(otherwise)]


def _module(nodes: Mapping[str, Node], name: str) -> str:
    return nodes[name].module if name in nodes else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _set_capabilities(trt: Any, config: Any, capabilities: Sequence[str]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        known = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}", None)
        if known is None or not config.set_compute_capability(known, index):
            raise _RefusedError([Reason(f"it does not build for compute capability {capability}", fix="choose --compute-capability")])


def _read_timing_cache(config: Any, path: Path) -> None:
    """Gives the builder what it measured before. What another version or GPU measured is refused by it, and then it starts anew."""
    saved = b""
    with contextlib.suppress(FileNotFoundError):
        saved = path.read_bytes()
    if not config.set_timing_cache(config.create_timing_cache(saved), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name when the block ends well, and goes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: Any) -> None:
    """Writes bytes, or what has a buffer, so that the file is there whole or not at all."""
    with atomic_file(path) as file:
        file.write(content)
