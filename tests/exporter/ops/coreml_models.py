"""Models of one operator for the Core ML implementations, and their execution by the interpreter."""

import unittest.mock
from contextlib import nullcontext

import numpy as np
import torch

from isthmus.exporter.ops.torch_library import wide
from isthmus.targets.coreml.convert import convert
from isthmus.targets.coreml.interpreter import Interpreter, load

# The passes without which there is no valid program: those that coremltools has for dtypes, constants and dead code. The others make it
# faster, on the device and not here. test_coreml.py holds the two against each other.
SHORT = [
    f"common::{name}"
    for name in (
        "update_output_dtypes cast_optimization const_elimination dead_code_elimination add_fp16_cast add_int16_cast update_output_dtypes "
        "const_elimination dead_code_elimination cast_optimization dead_code_elimination"
    ).split()
]


class Module(torch.nn.Module):
    """Calls one operator. What has neither batch nor length is a parameter, as in a model; `dynamic` names those that are inputs still."""

    def __init__(self, op, inputs, attributes, dynamic=()):
        super().__init__()
        self.op, self.attributes = op, attributes
        parameters = {a.name for a in op.inputs if "batch" not in a.shape and a.name in inputs and a.name not in dynamic}
        for name in parameters:
            self.register_buffer(name, torch.from_numpy(inputs[name].copy()))
        self.names = [name for name in inputs if name not in parameters]
        self.parameters_of = sorted(parameters)

    def forward(self, *tensors):
        given = dict(zip(self.names, tensors, strict=True)) | {name: getattr(self, name) for name in self.parameters_of}
        return getattr(torch.ops.isthmus, self.op.name)(**given, **self.attributes)


def converted(op, inputs, attributes, precision, *, passes=None, dynamic=(), dtype=None, unchecked=True):
    """The model and the names of its inputs. Activations are float32 in PyTorch unless `dtype` says otherwise."""
    op.part("torch")
    inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
    module = Module(op, inputs, attributes, dynamic)
    narrow = {a.name for a in op.inputs if not a.wide}
    tensors = [torch.from_numpy(inputs[name].copy()) for name in module.names]
    if dtype is not None:
        assert wide(dtype) == torch.float32
        tensors = [t.to(dtype) if name in narrow else t for name, t in zip(module.names, tensors, strict=True)]
    program = torch.export.export(module, tuple(tensors), strict=False)
    # coremltools checks the program after every pass, which is half of the time that a conversion takes.
    with unittest.mock.patch("coremltools.converters.mil.mil.Program.validate", return_value=None) if unchecked else nullcontext():
        return convert(program, precision, passes=passes), module.names


def execute(op, model, names, inputs):
    """The outputs by the operator's names, in float16 or float32 as the PyTorch program has them."""
    interpreter = Interpreter(load(model))
    results = interpreter.run({key: inputs[name].astype(np.float32) for key, name in zip(interpreter.inputs, names, strict=True)})
    return dict(zip((a.name for a in op.outputs), results.values(), strict=True))
