"""The native kernels through the C interface: what every processor of the family executes."""

from isthmus.exporter.ops.native import numpy_call

PART = "onnxruntime"
DTYPES = ("float32", "float16", "bfloat16")
ARITHMETIC = "float32"


def run(op, inputs, attributes):
    return numpy_call.run(op, inputs, attributes, level="baseline")


def not_run():
    return numpy_call.missing("baseline")
