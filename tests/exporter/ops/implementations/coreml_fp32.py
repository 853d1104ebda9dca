"""The Core ML lowering, converted with float32 computations, and executed by the interpreter of ML Programs."""

import functools
import importlib.util
import pathlib

PART = "coreml"
DTYPES = ("float32",)
ARITHMETIC = "float32"


@functools.cache
def helpers():
    path = pathlib.Path(__file__).parent.parent / "coreml_models.py"
    spec = importlib.util.spec_from_file_location("coreml_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(op, inputs, attributes):
    models = helpers()
    model, names = models.converted(op, inputs, attributes, "fp32", passes=models.SHORT)
    return models.execute(op, model, names, inputs)
