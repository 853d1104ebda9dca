"""A stand-in for the Python module `tensorrt`, which needs a GPU: it records calls, and checks each against the real signatures.

The signatures are read from the docstrings of `tensorrt_rtx`, whose bindings are made from the same source: a method that they do not
have, an argument of another name, number or kind, and an attribute that is no property there, are errors. Its enumerations are used as
they are. All that isthmus calls of `tensorrt` is in both modules (docs.nvidia.com/deeplearning/tensorrt/11.4.0/_static/python-api), so
that nothing here is checked against a list of our own.

Executed, the engine doubles its input, in the memory at the addresses that it was given. In a child process, what it answers is read from
the file that ISTHMUS_DOUBLE names, and its calls are written into `calls.json` beside it.
"""

# ruff: noqa: ARG002 - the signatures are the real ones

import ctypes
import functools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import tensorrt_rtx as real
from tensorrt_rtx import (  # noqa: F401 - the module's own
    ComputeCapability,
    DataType,
    LayerInformationFormat,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    OnnxParserFlag,
    ProfilingVerbosity,
    TensorIOMode,
)

__version__ = "11.4.0.106"

CALLS = []
"""Every call and every assignment: class, name, arguments."""

ANSWERS = {
    "engine": True,  # False: the builder makes none; a number: one of that many bytes
    "loads": True,  # False: an engine cannot be deserialised
    "errors": [],  # what the builder logs
    "parser": [],  # errors of the parser: node name, operator, description
    "cache_fits": True,
    "layers": {"Layers": []},
    "creators": [],  # name, version, namespace
    "limit": 8,  # the largest batch
    "runs": True,
    "missing": [],  # inputs whose shapes are not known
    "shape": None,  # of the output, where it is not the input's
    "takes": True,  # an address
}


def parameters(text):
    """Name, type and whether it has a default, of each parameter of a signature's text."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text + ","):
        depth += (c in "[(<") - (c in "])>" and text[i - 1 : i + 1] != "->")
        if c == "," and depth == 0:
            name, _, rest = text[start:i].strip().partition(":")
            kind, equals, _ = rest.partition(" = ")
            found.append((name.strip(), kind.strip(), bool(equals)))
            start = i + 1
    return found


@functools.cache
def signatures(owner, name):
    """The overloads of a method or function of the real module, without `self`."""
    method = getattr(getattr(real, owner) if owner else real, name)
    lines = re.findall(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\) ->", method.__doc__, re.MULTILINE)
    assert lines, f"{owner}.{name} has no signature in its docstring"
    rows = [parameters(line) for line in lines if line != "*args, **kwargs"]
    return [[p for p in row if p[0] not in ("self", "")] for row in rows]


def fits(value, kind):
    """Whether a value may be given where the real signature has this type."""
    plain = {"str": str, "bool": bool, "typing.SupportsInt": int, "tuple": tuple, "list": list}
    if kind in plain:
        return isinstance(value, plain[kind])
    if "Buffer" in kind:
        return isinstance(value, bytes | bytearray | memoryview)
    name = re.split(r"[.:]+", kind)[-1]
    if name == "Dims":  # made from any sequence of ints
        return isinstance(value, tuple | list) and all(isinstance(d, int) for d in value)
    known = getattr(real, name, None)
    return getattr(value, "REAL", None) == name or (known is not None and isinstance(value, known))


def check(owner, name, args, kwargs):
    """Raises TypeError where no overload takes the arguments; returns them by name."""
    for row in signatures(owner, name):
        names = [n for n, _, _ in row]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        required = {n for n, _, has_default in row if not has_default}
        if len(args) <= len(row) and set(given) <= set(names) and required <= set(given):
            kinds = {n: kind for n, kind, _ in row}
            if all(fits(value, kinds[n]) for n, value in given.items()):
                return given
    raise TypeError(f"{owner}.{name} does not take {args} {kwargs}: {signatures(owner, name)}")


def shown(value):
    return (
        value if isinstance(value, str | int | bool | float | list | tuple | type(None)) else getattr(value, "name", type(value).__name__)
    )


def record(owner, name, given):
    CALLS.append([owner, name, {n: shown(v) for n, v in given.items()}])
    if path := os.environ.get("ISTHMUS_DOUBLE"):
        Path(path).with_name("calls.json").write_text(json.dumps(CALLS))


def checked(function, owner, name):
    @functools.wraps(function)
    def call(self, *args, **kwargs):
        given = check(owner, name, args, kwargs)
        record(owner, name, given)
        return function(self, *args, **kwargs)

    return call


class Checked:
    """The base of the double's classes, each of which is called like the real one; those that are `PUBLIC` are made like it, too."""

    PUBLIC = False

    def __init_subclass__(cls, **extra):
        super().__init_subclass__(**extra)
        cls.REAL = getattr(cls, "REAL", cls.__name__)
        for name, value in list(vars(cls).items()):
            if callable(value) and (not name.startswith("_") or (name == "__init__" and cls.PUBLIC)):
                setattr(cls, name, checked(value, cls.REAL, name))
            elif isinstance(value, property):
                assert isinstance(vars(getattr(real, cls.REAL))[name], property), f"{cls.REAL}.{name} is no property"

    def __setattr__(self, name, value):
        if not name.startswith("_"):
            assert isinstance(vars(getattr(real, self.REAL)).get(name), property), f"{self.REAL} has no property {name}"
            record(self.REAL, f"{name} =", {"value": value})
        object.__setattr__(self, name, value)


class ILogger:
    REAL = "ILogger"
    Severity = real.ILogger.Severity

    def __init__(self):
        pass


class IStreamWriter:
    REAL = "IStreamWriter"

    def __init__(self):
        pass


class IHostMemory(bytes):
    REAL = "IHostMemory"

    @property
    def nbytes(self):
        return len(self)


class Creator:
    def __init__(self, name, version, namespace):
        self.name, self.plugin_version, self.plugin_namespace = name, version, namespace


class IPluginRegistry(Checked):
    def __init__(self):
        self._loaded = []

    def load_library(self, plugin_path):
        if plugin_path in self._loaded or not Path(plugin_path).is_file():
            return None
        self._loaded.append(plugin_path)
        return object()

    @property
    def all_creators(self):
        return [Creator(*row) for row in ANSWERS["creators"]] if self._loaded else []


class Builder(Checked):
    PUBLIC = True

    def __init__(self, logger):
        self._logger = logger

    def create_network(self, flags=0):
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network_to_stream(self, network, config, writer):
        for message in ANSWERS["errors"]:
            self._logger.log(ILogger.Severity.ERROR, message)
        self._logger.log(ILogger.Severity.WARNING, "a warning")
        pieces = (b"dou", b"ble") if ANSWERS["engine"] is True else (bytes(ANSWERS["engine"]),)
        return bool(ANSWERS["engine"]) and all(writer.write(piece) == len(piece) for piece in pieces)


class INetworkDefinition(Checked):
    @property
    def num_layers(self):
        return 3


class IOptimizationProfile(Checked):
    def set_shape(self, input, min, opt, max):
        return None


class ITimingCache(Checked):
    def __init__(self, content=b""):
        self._content = content

    def serialize(self):
        return IHostMemory(self._content + b"+measured")


class IBuilderConfig(Checked):
    def __init__(self):
        self._cache = None

    def set_memory_pool_limit(self, pool, pool_size):
        return None

    def add_optimization_profile(self, profile):
        return 0

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache._content and not ANSWERS["cache_fits"]:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache


class ParserError(Checked):
    def __init__(self, node, operator, text):
        self._node, self._operator, self._text = node, operator, text

    def node_name(self):
        return self._node

    def node_operator(self):
        return self._operator

    def desc(self):
        return self._text


class OnnxParser(Checked):
    PUBLIC = True

    def __init__(self, network, logger):
        self._errors = [ParserError(*row) for row in ANSWERS["parser"]]

    def set_flag(self, flag):
        return None

    def parse_from_file(self, model):
        assert Path(model).is_file()
        return not self._errors

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]

    def supports_operator(self, op_name):
        return True


class Runtime(Checked):
    PUBLIC = True

    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        if not ANSWERS["loads"]:
            self._logger.log(ILogger.Severity.ERROR, "the version tag does not match")
            return None
        return ICudaEngine()


class ICudaEngine(Checked):
    TENSORS = ("x", "y")

    def create_engine_inspector(self):
        return EngineInspector()

    def create_execution_context(self):
        return IExecutionContext(self) if ANSWERS["limit"] else None

    @property
    def num_io_tensors(self):
        return 2

    def get_tensor_name(self, index):
        return self.TENSORS[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType.FLOAT if name == "x" else DataType.BF16

    def get_tensor_profile_shape(self, name, profile_index):
        return [(1, 4), (2, 4), (ANSWERS["limit"], 4)]


class EngineInspector(Checked):
    def get_engine_information(self, format):
        assert format == LayerInformationFormat.JSON
        # As TensorRT: what depends on shapes is described for a context that has them, and left out without one.
        dynamic = any(name == "add_optimization_profile" for _, name, _ in CALLS)
        if dynamic and getattr(getattr(self, "execution_context", None), "_shape", None) is None:
            for layer in ANSWERS["layers"]["Layers"]:
                for value in layer["Inputs"]:
                    value.pop("Format/Datatype", None)
        return json.dumps(ANSWERS["layers"])


class IExecutionContext(Checked):
    def __init__(self, engine):
        self._shape, self._addresses = None, {}

    def set_input_shape(self, name, shape):
        self._shape = tuple(shape)
        return self._shape[0] <= ANSWERS["limit"]

    def infer_shapes(self):
        return ANSWERS["missing"]

    def get_tensor_shape(self, name):
        return ANSWERS["shape"] or self._shape

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return ANSWERS["takes"]

    def execute_async_v3(self, stream_handle):
        count = math.prod(self._shape)
        x, y = ((kind * count).from_address(self._addresses[n]) for kind, n in ((ctypes.c_float, "x"), (ctypes.c_uint16, "y")))
        # bfloat16 is the upper half of a float32; the values of the test lose nothing.
        np.frombuffer(y, np.uint16)[:] = (2 * np.frombuffer(x, np.float32)).view(np.uint32) >> 16
        return ANSWERS["runs"]


_REGISTRY = IPluginRegistry()


def get_plugin_registry():
    check(None, "get_plugin_registry", (), {})
    return _REGISTRY


if os.environ.get("ISTHMUS_DOUBLE"):
    ANSWERS.update(json.loads(Path(os.environ["ISTHMUS_DOUBLE"]).read_text()))
