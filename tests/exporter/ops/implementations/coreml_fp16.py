"""The Core ML lowering, converted with float16 computations, and executed by the interpreter, which rounds after every operation."""

import functools
import importlib.util
import pathlib

import numpy as np

PART = "coreml"
DTYPES = ("float16",)
ARITHMETIC = "float16"


@functools.cache
def helpers():
    path = pathlib.Path(__file__).parent.parent / "coreml_models.py"
    spec = importlib.util.spec_from_file_location("coreml_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(op, inputs, attributes):
    models = helpers()
    model, names = models.converted(op, inputs, attributes, "fp16", passes=models.SHORT)
    results = models.execute(op, model, names, inputs)
    half = {name: x.astype(np.float16) for name, x in results.items()}
    assert all(np.array_equal(half[name], x, equal_nan=True) for name, x in results.items())  # handed out in float32, computed in float16
    return {a.name: half[a.name].astype(np.float32) if a.wide else half[a.name] for a in op.outputs}
