"""What stands in for TensorRT and for a GPU in tests: a host that calls the plugins, and a driver that records what they launch.

The plugin library is the one that TensorRT loads, called through the same interfaces in the same order; only the table of driver functions
is another one, see `driver.h`. A recorded launch can be executed on the CPU (`Recorder.replay`).
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import IsthmusError
from ...op import OPS
from ..gpu import plan as plans

TYPES = {"float32": 0, "float16": 1, "int32": 3, "float8_e4m3fn": 6, "bfloat16": 7}
"""`nvinfer1::DataType` of a dtype."""

_FIELD_INT32, _FIELD_FLOAT32, _FIELD_TEXT, _FIELD_INT64 = 5, 1, 6, 10
_Dims = ctypes.c_int64 * 8


class _Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("length", ctypes.c_int32))


class _Fields(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int32), ("fields", ctypes.POINTER(_Field)))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("sizes", _Dims),
        ("least", _Dims),
        ("most", _Dims),
        ("address", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Launched:
    """A launch that the driver was told to do.

    Attributes:
        image: What identifies the kernel: the text of a library without kernels, see `tables.stub`.
        kernel: The name by which the function was taken from its module.
        grid: Programs on each axis.
        block: Threads on each axis.
        shared: Bytes of dynamic shared memory.
        stream: The stream's handle.
        arguments: Values of the parameters, in order: addresses, integers and floats; then the two addresses of scratch memory.
    """

    image: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    arguments: tuple[int | float, ...]

    def plan(self) -> tuple[plans.Plan, plans.Launch, tuple[plans.Parameter, ...]]:
        """The plan and the launch that it comes from, with the parameters without those of scratch memory."""
        operator, form, dtype, name, index = json.loads(self.image)
        op = OPS[operator]
        plan = next(p for p in op.part("gpu").plans() if (p.form, p.dtype, p.name) == (form, dtype, name))
        return plan, plan.launches[index], plans.parameters(op, plan, plan.launches[index])


class Recorder:
    """A CUDA driver without a GPU: it loads stubs, and keeps what it is told to launch.

    Attributes:
        capability: Of the device that it pretends to have.
        launches: What was launched.
        fills: Address, value and bytes of every memory fill.
        calls: Names of the driver functions called, in order.
        failing: The name of a function that fails, with the error code.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0), identify: Callable[[int], str] | None = None) -> None:
        """A driver of a device.

        Args:
            capability: The device's compute capability.
            identify: The text of `tables.stub` for the image at an address; it is the image itself in a library without kernels.
        """
        self.capability = capability
        self._identify = identify or (lambda address: ctypes.string_at(address).decode())
        self.launches: list[Launched] = []
        self.fills: list[tuple[int, int, int]] = []
        self.calls: list[str] = []
        self.failing: tuple[str, int] = ("", 0)
        self._images: dict[int, str] = {}
        self._functions: dict[int, tuple[str, str]] = {}
        self._next = 1 << 20
        self._text = ctypes.c_char_p(b"an error of the recorder")
        handle, number = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)
        unsigned = [ctypes.c_uint] * 7
        signatures: tuple[tuple[Any, list[Any]], ...] = (
            (self._context, [handle]),
            (self._device, [number]),
            (self._device_attribute, [number, ctypes.c_int, ctypes.c_int]),
            (self._load, [handle, ctypes.c_void_p]),
            (self._unload, [ctypes.c_void_p]),
            (self._function, [handle, ctypes.c_void_p, ctypes.c_char_p]),
            (self._function_attribute, [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]),
            (self._fill, [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p]),
            (self._launch, [ctypes.c_void_p, *unsigned, ctypes.c_void_p, handle, ctypes.c_void_p]),
            (self._error, [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]),
        )
        self._callbacks = [ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._counted(call)) for call, types in signatures]
        self.table = (ctypes.c_void_p * len(signatures))(*(ctypes.cast(c, ctypes.c_void_p).value for c in self._callbacks))

    def _counted(self, call: Any) -> Any:
        name = call.__name__.lstrip("_")

        def counted(*arguments: Any) -> int:
            self.calls.append(name)
            if self.failing[0] == name:
                return self.failing[1]
            call(*arguments)
            return 0

        return counted

    def _new(self) -> int:
        self._next += 1
        return self._next

    def _context(self, context: Any) -> None:
        context[0] = 1

    def _device(self, device: Any) -> None:
        device[0] = 0

    def _device_attribute(self, value: Any, attribute: int, _device: int) -> None:
        value[0] = {75: self.capability[0], 76: self.capability[1]}[attribute]

    def _load(self, module: Any, image: int) -> None:
        module[0] = self._new()
        self._images[module[0]] = self._identify(image)

    def _unload(self, module: int) -> None:
        del self._images[module]

    def _function(self, function: Any, module: int, name: bytes) -> None:
        function[0] = self._new()
        self._functions[function[0]] = (self._images[module], name.decode())

    def _function_attribute(self, function: int, attribute: int, value: int) -> None:
        assert function in self._functions
        assert (attribute, value > 0) == (8, True)

    def _fill(self, address: int, value: int, size: int, _stream: int) -> None:
        ctypes.memset(address, value, size)
        self.fills.append((address, value, size))

    def _launch(self, function: int, *rest: Any) -> None:
        *dims, stream, parameters, extra = rest
        assert extra is None
        image, kernel = self._functions[function]
        launched = Launched(image, kernel, tuple(dims[:3]), tuple(dims[3:6]), dims[6], stream or 0, ())
        _, _, expected = launched.plan()
        kinds = {"pointer": ctypes.c_uint64, "int": ctypes.c_int32, "float": ctypes.c_float}
        types: list[Any] = [*(kinds[p.kind] for p in expected), ctypes.c_uint64, ctypes.c_uint64]
        values = tuple(ctypes.cast(parameters[i], ctypes.POINTER(t))[0] for i, t in enumerate(types))
        self.launches.append(Launched(**{**launched.__dict__, "arguments": values}))

    def _error(self, _code: int, text: Any) -> None:
        text[0] = self._text

    def replay(self, buffers: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Executes what was recorded, on the CPU: addresses become the buffers in which they lie.

        Args:
            buffers: Memory by a name for messages, as bytes: every address must be within one of them.

        Raises:
            IsthmusError: An address is in no buffer, or not aligned as the kernels expect.
        """
        import torch

        from ..gpu.interpret import execute

        for launched in self.launches:
            _, launch, parameters = launched.plan()
            arguments: list[Any] = []
            for parameter, value in zip(parameters, launched.arguments[:-2], strict=True):
                if parameter.kind != "pointer":
                    arguments.append(value)
                    continue
                found = [(b, int(value) - b.ctypes.data) for b in buffers.values() if 0 <= int(value) - b.ctypes.data < b.nbytes]
                if len(found) != 1 or value % plans.ALIGNMENT:
                    raise IsthmusError(
                        f"{launched.kernel} was given the address {value} for {parameter.name}, which is in no buffer or not aligned"
                    )
                buffer, offset = found[0]
                # To the buffer's end: how much of it is the tensor's, no kernel is told.
                rest = torch.from_numpy(buffer.view(np.uint8).reshape(-1)[offset:])
                size = plans.ITEMSIZE[parameter.dtype]
                arguments.append(rest[: rest.numel() // size * size].view(getattr(torch, parameter.dtype)))
            execute(launch, launched.grid, arguments)


class Host:
    """Calls the plugins of a library.

    Raises:
        IsthmusError: It is no plugin library.
    """

    def __init__(self, host: Path, library: Path) -> None:
        self._host = ctypes.CDLL(str(host))
        for name, result in (("messages", ctypes.c_char_p), ("creator_name", ctypes.c_char_p)):
            getattr(self._host, f"isthmus_host_{name}").restype = result
        for name in ("open", "creator", "create", "attach"):
            getattr(self._host, f"isthmus_host_{name}").restype = ctypes.c_void_p
        for name in ("fields", "creator_fields"):
            getattr(self._host, f"isthmus_host_{name}").restype = ctypes.POINTER(_Fields)
        self._library = self._call("open", str(library).encode())
        if not self._library:
            raise IsthmusError(f"{library} cannot be loaded: {self.messages()}")
        self._plugins = ctypes.CDLL(str(library))
        self._creators: dict[str, int] = {}
        while creator := self._call("creator", self._library, len(self._creators)):
            self._creators[self._call("creator_name", creator).decode()] = creator

    @property
    def names(self) -> tuple[str, ...]:
        """The node types that the library has plugins for."""
        return tuple(self._creators)

    def field_names(self, node_type: str) -> dict[str, int]:
        """The attributes that a node type has, and their `nvinfer1::PluginFieldType`."""
        fields = self._call("creator_fields", self._creators[node_type])[0]
        return {fields.fields[i].name.decode(): fields.fields[i].type for i in range(fields.count)}

    def use(self, driver: Recorder | None) -> None:
        """Puts a driver in the place of CUDA's, or takes it away."""
        self._driver = driver
        self._plugins.isthmus_trt_set_driver(None if driver is None else ctypes.byref(driver.table))

    def messages(self) -> str:
        """What the plugins logged since the last call."""
        return str(self._call("messages").decode().strip())

    def create(self, node_type: str, attributes: Mapping[str, int | float | str], name: str = "node") -> Plugin:
        """A plugin for a node.

        Raises:
            IsthmusError: The creator refuses the attributes.
        """
        keep: list[Any] = []
        rows = []
        for key, value in attributes.items():
            if isinstance(value, str):
                data: Any = ctypes.create_string_buffer(value.encode(), len(value.encode()) or 1)
                kind, length = _FIELD_TEXT, len(value.encode())
            elif isinstance(value, float):
                data, kind, length = ctypes.c_float(value), _FIELD_FLOAT32, 1
            else:
                data, kind, length = ctypes.c_int32(value), _FIELD_INT32, 1
            keep.append(data)
            rows.append(_Field(key.encode(), ctypes.cast(ctypes.byref(data), ctypes.c_void_p), kind, length))
        fields = _Fields(len(rows), (_Field * max(len(rows), 1))(*rows))
        return self._created(node_type, name, fields, 0)

    def _created(self, node_type: str, name: str, fields: _Fields, phase: int) -> Plugin:
        handle = self._call("create", self._creators[node_type], name.encode(), ctypes.byref(fields), phase)
        if not handle:
            raise IsthmusError(f"{node_type} was not created: {self.messages()}")
        return Plugin(self, node_type, handle)

    def _call(self, name: str, *arguments: Any) -> Any:
        # Handles are wider than the int that ctypes passes a Python number as.
        given = [ctypes.c_void_p(a) if isinstance(a, int) and a > 2**31 else a for a in arguments]
        return getattr(self._host, f"isthmus_host_{name}")(*given)


class Plugin:
    """A plugin of a node."""

    def __init__(self, host: Host, node_type: str, handle: int) -> None:
        self._host, self.node_type, self._handle = host, node_type, handle

    def __del__(self) -> None:
        self._host._call("destroy", self._handle)

    def fields(self) -> dict[str, int | float | str]:
        """The attributes that it would put into an engine."""
        fields = self._host._call("fields", self._handle)[0]
        return {fields.fields[i].name.decode(): _value(fields.fields[i]) for i in range(fields.count)}

    def restored(self) -> Plugin:
        """The plugin as an engine restores it from these attributes."""
        fields = self._host._call("fields", self._handle)[0]
        return self._host._created(self.node_type, "node", fields, 1)

    def infer(self, inputs: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
        """Dtypes and shapes of the outputs, from those of the inputs.

        Raises:
            IsthmusError: The plugin refuses them.
        """
        outputs = (_Tensor * self._host._call("output_count", self._handle))()
        self._done("infer", _tensors(inputs), len(inputs), outputs, len(outputs))
        names = {number: name for name, number in TYPES.items()}
        return [(names[t.type], tuple(t.sizes[: t.rank])) for t in outputs]

    def supports(self, tensors: Sequence[tuple[str, tuple[int, ...]]], outputs: int, tensor_format: int = 0) -> bool:
        """Whether it takes inputs and outputs of these dtypes in a format; 0 is linear."""
        return bool(self._host._call("supports", self._handle, _tensors(tensors), len(tensors) - outputs, outputs, tensor_format))

    def configure(
        self,
        tensors: Sequence[tuple[str, tuple[int, ...]]],
        outputs: int,
        least: Sequence[tuple[int, ...]] | None = None,
        most: Sequence[tuple[int, ...]] | None = None,
    ) -> int:
        """The bytes of workspace for a range of shapes around the given ones.

        Raises:
            IsthmusError: The plugin refuses them.
        """
        size = ctypes.c_uint64()
        self._done("configure", _tensors(tensors, least, most), len(tensors) - outputs, outputs, ctypes.byref(size))
        return size.value

    def enqueue(self, arrays: Sequence[np.ndarray[Any, Any]], outputs: int, workspace: np.ndarray[Any, Any], stream: int = 0) -> None:
        """Launches the kernels as an execution context of these shapes does.

        Args:
            arrays: Inputs and outputs; their addresses stand for those of device memory.
            outputs: How many of them are outputs.
            workspace: Memory of the size that `configure` returned.
            stream: The stream's handle.

        Raises:
            IsthmusError: The plugin refuses the shapes, or could not launch.
        """
        tensors = _tensors([(a.dtype.name, a.shape) for a in arrays])
        for tensor, array in zip(tensors, arrays, strict=True):
            tensor.address = array.ctypes.data
        context = Plugin(self._host, self.node_type, self._host._call("attach", self._handle))
        context._done("shapes", tensors, len(arrays) - outputs, outputs)
        address = ctypes.c_void_p(workspace.ctypes.data)
        context._done("enqueue", tensors, len(arrays) - outputs, outputs, address, ctypes.c_void_p(stream))

    def _done(self, name: str, *arguments: Any) -> None:
        if status := self._host._call(name, self._handle, *arguments):
            raise IsthmusError(f"{self.node_type} returned {status} from {name}: {self._host.messages()}")


def _tensors(
    described: Sequence[tuple[str, tuple[int, ...]]],
    least: Sequence[tuple[int, ...]] | None = None,
    most: Sequence[tuple[int, ...]] | None = None,
) -> Any:
    result = (_Tensor * len(described))()
    for i, (dtype, shape) in enumerate(described):
        result[i].type, result[i].rank = TYPES[dtype], len(shape)
        ends = (shape, least[i] if least else shape, most[i] if most else shape)
        result[i].sizes, result[i].least, result[i].most = (_Dims(*sizes) for sizes in ends)
    return result


def _value(field: _Field) -> int | float | str:
    if field.type == _FIELD_TEXT:
        return ctypes.string_at(field.data, field.length).decode()
    kind: Any = {_FIELD_FLOAT32: ctypes.c_float, _FIELD_INT32: ctypes.c_int32, _FIELD_INT64: ctypes.c_int64}[field.type]
    return ctypes.cast(field.data, ctypes.POINTER(kind))[0]  # type: ignore[no-any-return]  # untyped
