"""The TensorRT plugin: its library is driven as TensorRT drives it, its driver records launches, and Triton's interpreter executes them.

Between the node and the numbers lies all of the plugin: attributes, which are written into an engine and read back, types, shapes,
workspace, the choice of the plan, grids and arguments. What the machine code computes, only a GPU can say.
"""

import functools

import ml_dtypes
import numpy as np

from isthmus.exporter.errors import MachineError
from isthmus.exporter.op import evaluate
from isthmus.exporter.ops.plugin import build, headers
from isthmus.exporter.ops.plugin.host import Host, Recorder

PART = "tensorrt"
# In the other dtypes the launches are recorded and held against the plans (plugin/test_launches.py), and the plans run as the GPU part.
DTYPES = ("float16",)
ARITHMETIC = "float32"

NUMPY = {"float32": np.dtype("float32"), "float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ALIGNMENT = 256  # of what cudaMalloc returns


@functools.cache
def not_run() -> str:
    try:
        build.find_compiler()
        headers.find_or_fetch()
    except MachineError as error:
        return str(error)
    return ""


@functools.cache
def host() -> Host:
    return Host(build.build_host(), build.build(architectures=()))


def buffer(size: int) -> np.ndarray:
    """Aligned memory in which every number is NaN, so that what is not written shows."""
    memory = np.full(size + ALIGNMENT, 0xFF, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def placed(x: np.ndarray) -> np.ndarray:
    array = buffer(x.nbytes).view(x.dtype).reshape(x.shape)
    array[...] = x
    return array


def record(op, inputs, attributes):
    """The launches of one call, and the buffers of its inputs, outputs and workspace."""
    form = op.form(frozenset(inputs), attributes)
    fields = {n: int(v) if isinstance(v, bool) else v for n, v in attributes.items() if n not in form.fixed}
    sizes = op.infer({n: x.shape for n, x in inputs.items()}, attributes)
    known = {a.name: a for a in op.inputs}
    dtype = inputs[op.inputs[0].name].dtype

    def zeros(argument):
        return np.zeros([evaluate(d, sizes) for d in argument.shape], np.float32 if argument.wide else dtype)

    given = [placed(inputs[n] if n in inputs else zeros(known[n])) for n in form.inputs]
    plugin = host().create(form.op_type, fields).restored()
    described = [(x.dtype.name, x.shape) for x in given]
    results = plugin.infer(described)
    outputs = [buffer(int(np.prod(shape)) * NUMPY[name].itemsize).view(NUMPY[name]).reshape(shape) for name, shape in results]
    assert plugin.supports([*described, *results], len(results))
    workspace = buffer(plugin.configure([*described, *results], len(results)))
    recorder = Recorder()
    host().use(recorder)
    try:
        plugin.enqueue([*given, *outputs], len(outputs), workspace)
    finally:
        host().use(None)
    return recorder, given, outputs, workspace


def run(op, inputs, attributes):
    recorder, given, outputs, workspace = record(op, inputs, attributes)
    before = [x.copy() for x in given]
    recorder.replay(
        {**{f"input {i}": x for i, x in enumerate(given)}, **{f"output {i}": x for i, x in enumerate(outputs)}, "workspace": workspace}
    )
    for x, kept in zip(given, before, strict=True):
        assert x.tobytes() == kept.tobytes(), "an input was written to"
    return {a.name: x for a, x in zip(op.outputs, outputs, strict=True)}
