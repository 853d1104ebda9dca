"""The native kernels through the C interface: AVX2, FMA and F16C."""

from isthmus.exporter.ops.native import numpy_call

PART = "onnxruntime"
DTYPES = ("float32", "float16", "bfloat16")
ARITHMETIC = "float32"


def run(op, inputs, attributes):
    return numpy_call.run(op, inputs, attributes, level="avx2")


def not_run():
    return numpy_call.missing("avx2")
