"""The Core AI lowering, converted, and executed by the runtime of coreai-core on the CPU.

Half of a conversion's time is torch's, whatever the program: one program computes a case in both dtypes, on inputs of its own for each.
"""

import asyncio
import atexit
import functools
import pathlib
import tempfile

import numpy as np
import torch

from isthmus.exporter.op import OPS
from isthmus.exporter.ops.coreai_table import coreai_torch, decompose

PART = "coreai"
DTYPES = ("float32", "float16")
ARITHMETIC = "float32"


class _Calls(torch.nn.Module):
    """One call of an operator for each dtype; `names` are those of its inputs."""

    def __init__(self, op, names, attributes):
        super().__init__()
        self.operator, self.names, self.attributes = getattr(torch.ops.isthmus, op.name), names, attributes

    def forward(self, *tensors):
        outputs = []
        for start in range(0, len(tensors), len(self.names)):
            inputs = dict(zip(self.names, tensors[start : start + len(self.names)], strict=True))
            results = self.operator(**inputs, **self.attributes)
            outputs += results if isinstance(results, tuple) else [results]
        return tuple(outputs)


def exported(op, attributes, calls, dynamic_shapes=None):
    """The program of one call of the operator for each of `calls`, its inputs, in the operator's terms."""
    op.part("torch")
    tensors = tuple(torch.from_numpy(x.copy()) for inputs in calls.values() for x in inputs.values())
    names = tuple(next(iter(calls.values())))
    shapes = None if dynamic_shapes is None else {"tensors": tuple(dynamic_shapes[name] for _ in calls for name in names)}
    return torch.export.export(_Calls(op, names, attributes), tensors, dynamic_shapes=shapes)


def convert(op, attributes, calls, dynamic_shapes=None):
    """The Core AI program of `exported`. The names of its inputs and outputs are those of the call, a dot, and the operator's."""
    program = decompose(exported(op, attributes, calls, dynamic_shapes))
    TorchConverter = coreai_torch().TorchConverter
    inputs = [f"{call}.{name}" for call, inputs in calls.items() for name in inputs]
    outputs = [f"{call}.{a.name}" for call in calls for a in op.outputs]
    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
    return converter.add_exported_program(program, input_names=inputs, output_names=outputs).to_coreai()


def execute(program, calls):
    """The outputs of a program for the inputs of its calls, in the same form."""
    return _runner().run(_execute(program, calls))


async def _execute(program, calls):
    from coreai.runtime import NDArray

    arrays = {f"{call}.{name}": NDArray(np.ascontiguousarray(x)) for call, inputs in calls.items() for name, x in inputs.items()}
    with tempfile.TemporaryDirectory() as folder:
        asset = program.save_asset(pathlib.Path(folder) / "operator.aimodel")
        async with asset.executable() as model:
            function = model.load_function("main")
            results = await function(arrays)
            outputs = {call: {} for call in calls}
            for name in function.desc.output_names:
                call, output = name.split(".")
                outputs[call][output] = results[name].numpy().copy()
            return outputs


@functools.cache
def _runner():
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


@functools.cache
def _program(name, attributes, shapes):
    op = OPS[name]
    return convert(op, dict(attributes), {dtype: _zeros(op, shapes, dtype) for dtype in DTYPES})


def _zeros(op, shapes, dtype):
    wide = {a.name for a in op.inputs if a.wide}
    return {name: np.zeros(shape, "float32" if name in wide else dtype) for name, shape in shapes}


def run(op, inputs, attributes):
    shapes = tuple((name, x.shape) for name, x in inputs.items())
    program = _program(op.name, tuple(attributes.items()), shapes)
    dtype = str(inputs[op.inputs[0].name].dtype)
    calls = {other: _zeros(op, shapes, other) for other in DTYPES} | {dtype: inputs}
    return execute(program, calls)[dtype]
